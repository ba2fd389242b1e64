//! The all-zero test.

/// Bytes folded per step: long enough for the compiler to keep several vector registers busy,
/// short enough that a chunk that is not zero is found out early.
const BLOCK: usize = 256;

/// Whether every byte is zero. Most chunks of a virtual disk are, so this runs at the speed of
/// memory: whole words are folded together and looked at once per block.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    let mut blocks = bytes.chunks_exact(BLOCK);
    let zero = blocks.by_ref().all(|block| {
        let (words, _) = block.as_chunks::<16>();
        words.iter().fold(0, |fold, word| fold | u128::from_ne_bytes(*word)) == 0
    });
    zero && blocks.remainder().iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_set_bit_anywhere_is_found() {
        for len in [0, 1, 15, 16, 17, 255, 256, 257, 1000] {
            let mut bytes = vec![0; len];
            assert!(is_zero(&bytes));
            for at in 0..len {
                bytes[at] = 1 << (at % 8);
                assert!(!is_zero(&bytes), "byte {at} of {len}");
                bytes[at] = 0;
            }
        }
    }
}
