//! Reading a directory piece by piece.

use rustix::io::Errno;
use tokio::sync::Mutex;

use crate::view::{Cursor, Listed, View};

/// Names handed out at a time: more than fit in what the kernel asks for at once.
const PAGE: usize = 1024;

/// An open directory. What was read of it is kept, so that its offsets mean something.
#[derive(Debug)]
pub(crate) struct Directory {
    ino: u64,
    listing: Mutex<Listing>,
}

#[derive(Debug)]
struct Listing {
    names: Vec<Listed>,
    cursor: Cursor,
}

impl Directory {
    pub(crate) fn new(ino: u64) -> Self {
        let listing = Listing { names: Vec::new(), cursor: Cursor::Start };
        Self { ino, listing: Mutex::new(listing) }
    }

    /// The names from `offset` on, each with the offset behind it: some, or all that are left.
    /// Offsets are counts; `.` and `..` are the first two.
    pub(crate) async fn read(&self, view: &View, offset: u64) -> Result<Vec<(u64, Listed)>, Errno> {
        let mut listing = self.listing.lock().await;
        if offset == 0 {
            // From the start, or rewound: as it is now.
            *listing = Listing { names: Vec::new(), cursor: Cursor::Start };
            for name in [".", ".."] {
                let attributes = view.attributes_of(self.ino).await?;
                listing.names.push(Listed { name: name.to_owned(), attributes });
            }
        }
        let from = usize::try_from(offset).map_err(|_| Errno::INVAL)?;
        while listing.names.len() <= from && !matches!(listing.cursor, Cursor::End) {
            let (names, cursor) = view.list(self.ino, &listing.cursor).await?;
            listing.names.extend(names);
            listing.cursor = cursor;
        }
        let rest = listing.names.iter().skip(from).take(PAGE).cloned();
        Ok((offset + 1..).zip(rest).collect())
    }
}
