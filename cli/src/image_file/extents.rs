//! Where a sparse file has data.

use std::fs::File;
use std::io;
use std::ops::Range;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

/// The next range from `at` on that holds data; `None` when there are only zeros up to the file's
/// end at `size`. A file system that does not tell says that all of it is data.
pub(super) fn next_data(file: &File, at: u64, size: u64) -> io::Result<Option<Range<u64>>> {
    if at >= size {
        return Ok(None);
    }
    let start = match seek(file, SeekFrom::Data(at)) {
        Ok(start) if start < size => start,
        // No data from here to the end.
        Ok(_) | Err(Errno::NXIO) => return Ok(None),
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some(at..size)),
        Err(e) => return Err(e.into()),
    };
    let end = seek(file, SeekFrom::Hole(start))?.min(size);
    Ok(Some(start..end))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_sparse_file_has_only_its_data() {
        const SIZE: u64 = 1 << 40;
        let file = tempfile::tempfile().unwrap();
        file.set_len(SIZE).unwrap();
        assert_eq!(next_data(&file, 0, SIZE).unwrap(), None);
        file.write_all_at(b"x", 5 << 30).unwrap();
        file.write_all_at(b"y", SIZE - 1).unwrap();
        let first = next_data(&file, 0, SIZE).unwrap().unwrap();
        assert!(first.contains(&(5 << 30)) && first.end < 6 << 30, "{first:?}");
        let last = next_data(&file, first.end, SIZE).unwrap().unwrap();
        assert!(last.contains(&(SIZE - 1)) && last.end == SIZE, "{last:?}");
        assert_eq!(next_data(&file, last.end, SIZE).unwrap(), None);
    }

    #[test]
    fn an_empty_file_has_none() {
        assert_eq!(next_data(&tempfile::tempfile().unwrap(), 0, 0).unwrap(), None);
    }
}
