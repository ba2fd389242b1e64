use blobcr_proto::codec::compress;
use blobcr_proto::record::{open, whole};
use blobcr_proto::v1::{Codec, RecordKind};
use proptest::prelude::*;
use rand::{RngCore, SeedableRng, rngs::StdRng};

use super::*;

fn stripe(policy: &str) -> Stripe {
    Stripe::of(policy.parse().unwrap()).unwrap()
}

fn random(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    StdRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    bytes
}

fn record(plain: &[u8], codec: Codec) -> v1::Record {
    let (codec, payload) = match compress(codec, plain) {
        Some(payload) => (codec, payload),
        None => (Codec::Plain, plain.to_vec()),
    };
    whole(RecordKind::Chunk, Hash::of(plain), codec, plain.len(), payload.into())
}

/// All ways to choose `count` of `from`.
fn choices<T: Copy>(from: &[T], count: usize) -> Vec<Vec<T>> {
    let Some((first, rest)) = from.split_first() else {
        return if count == 0 { vec![Vec::new()] } else { Vec::new() };
    };
    let mut all = choices(rest, count);
    if count > 0 {
        all.extend(choices(rest, count - 1).into_iter().map(|mut some| {
            some.insert(0, *first);
            some
        }));
    }
    all
}

fn every_choice_gives_it_back(stripe: &Stripe, record: &v1::Record) {
    let shards: Vec<Shard> =
        stripe.cut(record).unwrap().iter().map(|shard| stripe.open(shard).unwrap()).collect();
    assert_eq!(shards.len(), stripe.shards());
    let all: Vec<&Shard> = shards.iter().collect();
    for some in choices(&all, stripe.needed()) {
        let joined = stripe.join(&some).unwrap();
        assert_eq!(&joined, record);
        open(&joined).unwrap();
    }
    assert!(stripe.join(&all[1..stripe.needed()]).is_err(), "one too few");
    assert!(stripe.join(&vec![all[0]; stripe.needed()]).is_err(), "one shard K times");
}

#[test]
fn any_k_shards_give_a_record_of_any_size_back() {
    for policy in ["ec:2+1", "ec:3+3", "ec:4+2"] {
        let stripe = stripe(policy);
        for len in [0, 1, 2, 3, 4, 5, 63, 64, 65, 4095, 70_001, 262_144, PLAIN_LEN_MAX] {
            every_choice_gives_it_back(&stripe, &record(&random(len as u64, len), Codec::Plain));
        }
    }
    let widest = stripe("ec:16+8");
    let cut = widest.cut(&record(&random(1, 1000), Codec::Plain)).unwrap();
    let shards: Vec<Shard> = cut.iter().map(|shard| widest.open(shard).unwrap()).collect();
    widest.join(&shards[8..].iter().collect::<Vec<_>>()).unwrap();
}

#[test]
fn a_shard_takes_its_part_of_the_room() {
    let cut = stripe("ec:4+2").cut(&record(&random(1, 262_144), Codec::Plain)).unwrap();
    assert!(cut.iter().all(|shard| shard.payload.len() == 65_536 + HEADER_LEN));
}

#[test]
fn any_flipped_bit_of_a_shard_is_found() {
    let stripe = stripe("ec:3+2");
    let good = stripe.cut(&record(&random(7, 100), Codec::Plain)).unwrap().swap_remove(4);
    for bit in 0..good.payload.len() * 8 {
        let mut payload = good.payload.to_vec();
        payload[bit / 8] ^= 1 << (bit % 8);
        let bad = v1::Record { payload: payload.into(), ..good.clone() };
        assert!(matches!(stripe.open(&bad), Err(ShardError::Record(_))));
    }
}

#[test]
fn a_shard_that_lies_with_a_right_checksum_is_found_when_it_is_used() {
    let stripe = stripe("ec:2+2");
    let whole = record(&random(3, 1000), Codec::Plain);
    let mut cut = stripe.cut(&whole).unwrap();
    let mut payload = cut[2].payload.to_vec();
    payload[HEADER_LEN + 30] ^= 4;
    cut[2].payload_crc32c = crc32c(&payload);
    cut[2].payload = payload.into();
    let shards: Vec<Shard> = cut.iter().map(|shard| stripe.open(shard).unwrap()).collect();
    let lie = stripe.join(&[&shards[1], &shards[2]]).unwrap_err();
    assert!(matches!(lie, ShardError::Misfit { shards, .. } if shards == [2, 3]));
    assert_eq!(stripe.join(&[&shards[1], &shards[3]]).unwrap(), whole);
}

#[test]
fn shards_of_two_encodings_are_never_mixed() {
    let stripe = stripe("ec:2+1");
    let plain = b"the same sixteen".repeat(300);
    let open = |codec| -> Vec<Shard> {
        let cut = stripe.cut(&record(&plain, codec)).unwrap();
        cut.iter().map(|shard| stripe.open(shard).unwrap()).collect()
    };
    let (lz4, zstd) = (open(Codec::Lz4), open(Codec::Zstd));
    assert!(stripe.join(&[&lz4[0], &zstd[1]]).is_err());
    stripe.join(&[&zstd[0], &zstd[2]]).unwrap();
}

#[test]
fn headers_that_contradict_their_record_are_refused() {
    let stripe = stripe("ec:2+1");
    let cut = stripe.cut(&record(&random(1, 500), Codec::Plain)).unwrap();
    let damaged = |at: usize, value: u8| {
        let mut payload = cut[0].payload.to_vec();
        payload[at] = value;
        let payload_crc32c = crc32c(&payload);
        stripe.open(&v1::Record { payload: payload.into(), payload_crc32c, ..cut[0].clone() })
    };
    for (at, value) in [(0, 0), (4, 2), (5, 3), (6, 2), (7, 2), (8, 0), (10, 0xFF), (11, 0xFF)] {
        assert!(matches!(damaged(at, value), Err(ShardError::Malformed { .. })), "{at}");
    }
    let mut renumbered = cut[0].clone();
    renumbered.r#ref.as_mut().unwrap().shard = 2;
    assert!(stripe.open(&renumbered).is_err());
    assert!(stripe.open(&record(b"whole", Codec::Plain)).is_err());
    assert!(stripe.cut(&cut[0]).is_err(), "a shard is not cut again");
    assert!(Stripe::of("replica:2".parse().unwrap()).is_none());
}

/// The bytes of shards, and with them those of the compressors: when these change, old and new
/// writers cut the same object differently, and their shards must not meet in one pool.
#[test]
fn golden_shards_of_version_1() {
    let plain: Vec<u8> = (0..600u32).flat_map(|n| (n / 7 * 31).to_le_bytes()).collect();
    let shown: String = [Codec::Plain, Codec::Lz4, Codec::Zstd]
        .into_iter()
        .flat_map(|codec| stripe("ec:4+2").cut(&record(&plain, codec)).unwrap())
        .map(|shard| {
            let bytes = &shard.payload[..HEADER_LEN + 16];
            let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            format!("{hex} {:08x}\n", shard.payload_crc32c)
        })
        .collect();
    assert_eq!(shown, include_str!("../../golden/shards-v1.txt"), "\n{shown}");
}

proptest! {
    #[test]
    fn any_bytes_survive_any_losses(
        plain in proptest::collection::vec(0u8..8, 0..3000),
        data in 2u8..9,
        parity in 1u8..5,
        order in any::<u64>(),
    ) {
        let stripe = Stripe::of(Policy::Erasure { data, parity }).unwrap();
        let whole = record(&plain, Codec::Lz4);
        let mut shards: Vec<Shard> =
            stripe.cut(&whole).unwrap().iter().map(|shard| stripe.open(shard).unwrap()).collect();
        let mut rng = StdRng::seed_from_u64(order);
        while shards.len() > stripe.needed() {
            shards.swap_remove(rng.next_u32() as usize % shards.len());
        }
        let some: Vec<&Shard> = shards.iter().collect();
        prop_assert_eq!(stripe.join(&some).unwrap(), whole);
    }

    #[test]
    fn rubbish_never_panics(
        payload in proptest::collection::vec(any::<u8>(), 0..64),
        shard in 0u8..8,
        seed in 0usize..16,
    ) {
        let stripe = stripe("ec:4+2");
        let mut bytes = stripe.cut(&record(b"some plain bytes", Codec::Plain)).unwrap()[0].payload.to_vec();
        // Right up to somewhere, so that every check is reached.
        bytes.truncate(seed);
        bytes.extend(payload);
        let key = RecordKey { kind: RecordKind::Chunk, id: Hash::of(b"x"), shard };
        let record = v1::Record {
            r#ref: Some(key.to_ref()),
            payload_crc32c: crc32c(&bytes),
            payload: bytes.into(),
            ..v1::Record::default()
        };
        if let Ok(shard) = stripe.open(&record) {
            let _ = stripe.join(&[&shard, &shard, &shard, &shard]);
        }
    }
}
