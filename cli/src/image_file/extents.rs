//! Where a sparse file has data.

use std::fs::File;
use std::io;
use std::ops::Range;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

/// The ranges of `file` that hold data, in order. A file system that does not tell says that all
/// of it is data.
pub(super) fn data_ranges(file: &File, size: u64) -> io::Result<Vec<Range<u64>>> {
    let mut ranges = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            // No data from here to the end.
            Err(Errno::NXIO) => break,
            Err(Errno::INVAL | Errno::OPNOTSUPP) => {
                ranges.push(at..size);
                break;
            }
            Err(e) => return Err(e.into()),
        };
        if start >= size {
            break;
        }
        let end = seek(file, SeekFrom::Hole(start))?.min(size);
        ranges.push(start..end);
        at = end;
    }
    Ok(ranges)
}

/// The chunks that `ranges` touch: sorted, each once.
pub(super) fn chunks_of(ranges: &[Range<u64>], chunk_size: u64) -> Vec<u64> {
    let mut chunks = Vec::new();
    let mut next = 0;
    for range in ranges.iter().filter(|range| !range.is_empty()) {
        let first = (range.start / chunk_size).max(next);
        next = range.end.div_ceil(chunk_size);
        chunks.extend(first..next);
    }
    chunks
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_sparse_file_has_only_its_data() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 40).unwrap();
        assert_eq!(data_ranges(&file, 1 << 40).unwrap(), []);
        file.write_all_at(b"x", 5 << 30).unwrap();
        file.write_all_at(b"y", (1 << 40) - 1).unwrap();
        let ranges = data_ranges(&file, 1 << 40).unwrap();
        assert_eq!(ranges.len(), 2, "{ranges:?}");
        assert!(ranges[0].contains(&(5 << 30)) && ranges[1].contains(&((1 << 40) - 1)));
    }

    #[test]
    fn an_empty_file_has_none() {
        assert_eq!(data_ranges(&tempfile::tempfile().unwrap(), 0).unwrap(), []);
    }

    proptest::proptest! {
        #[test]
        fn chunks_are_sorted_unique_and_complete(
            cuts in proptest::collection::btree_set(0u64..2000, 0..20),
        ) {
            let cuts: Vec<_> = cuts.into_iter().collect();
            let ranges: Vec<_> = cuts.chunks_exact(2).map(|pair| pair[0]..pair[1]).collect();
            let chunks = chunks_of(&ranges, 64);
            let expected: std::collections::BTreeSet<_> =
                ranges.iter().cloned().flatten().map(|byte| byte / 64).collect();
            proptest::prop_assert_eq!(chunks, expected.into_iter().collect::<Vec<_>>());
        }
    }
}
