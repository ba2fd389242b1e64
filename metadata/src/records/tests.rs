//! Tests of the envelope that all records share, and of every kind in it.

use blobcr_proto::v1;
use proptest::prelude::*;
use prost::Message;

use super::*;

/// The bytes of a record with any body, and a checksum that fits.
fn envelope(version: u8, kind: u8, key: &Key, body: &[u8]) -> Bytes {
    let mut out = BytesMut::new();
    out.put_slice(&MAGIC);
    out.put_slice(&[version, kind, 0, 0]);
    let sum = crc(&out, key, body);
    out.put_u32_le(sum);
    out.put_slice(body);
    out.freeze()
}

fn name() -> impl Strategy<Value = String> {
    "[a-zA-Z0-9][a-zA-Z0-9._+-]{0,127}"
}

fn id() -> impl Strategy<Value = u64> {
    prop_oneof![1..1000u64, 1..u64::MAX]
}

fn root() -> impl Strategy<Value = v1::TreeRoot> {
    (0..=8u64 << 40, 16..=22u32, 1..=10u32, prop::option::of(any::<[u8; 32]>())).prop_map(
        |(size_bytes, chunk, fan_out, node)| v1::TreeRoot {
            size_bytes,
            chunk_size: 1 << chunk,
            fan_out: 1 << fan_out,
            node: node.map_or_else(Bytes::new, |node| Bytes::copy_from_slice(&node)),
        },
    )
}

fn stats() -> impl Strategy<Value = v1::SnapshotStats> {
    any::<[u64; 7]>().prop_map(|n| v1::SnapshotStats {
        dirty_chunks: n[0],
        dirty_bytes: n[1],
        stored_chunks: n[2],
        stored_bytes: n[3],
        zero_chunks: n[4],
        tree_nodes: n[5],
        persist_ms: n[6],
    })
}

fn image() -> impl Strategy<Value = ImageRecord> {
    (id(), name(), 1..u32::MAX, 16..=22u32, any::<[u64; 5]>(), "\\PC{0,50}").prop_map(
        |(id, name, pool, chunk, n, writer)| ImageRecord {
            id,
            name,
            pool,
            chunk_size: 1 << chunk,
            created_unix_ms: n[0],
            latest: n[1].min(n[2]),
            highest_number: n[1].max(n[2]),
            parent_image: n[3],
            parent_snapshot: n[4],
            writer,
            removed_unix_ms: n[0] % 2 * n[4],
            left_behind: n[1].min(n[2]),
        },
    )
}

fn snapshot() -> impl Strategy<Value = SnapshotRecord> {
    let texts = ("\\PC{0,50}", "\\PC{0,50}");
    (
        id(),
        1..=SNAPSHOT_NUMBER_MAX,
        1..=4i32,
        root(),
        prop::option::of(stats()),
        any::<[u64; 3]>(),
        texts,
    )
        .prop_map(|(image_id, number, state, root, stats, n, (reason, writer))| {
            SnapshotRecord {
                image_id,
                number,
                state,
                root: (state != v1::SnapshotState::Pending as i32).then_some(root),
                created_unix_ms: n[0],
                stable_unix_ms: n[1],
                stats,
                reason,
                writer,
                lease_id: n[2],
                obsolete_generation: n[1],
            }
        })
}

fn set_vm() -> impl Strategy<Value = SetVmRecord> {
    let disk = (name(), name(), id(), id()).prop_map(|(disk, image, image_id, number)| SetDisk {
        disk,
        image,
        image_id,
        number,
    });
    (name(), any::<u64>(), name(), prop::collection::vec(disk, 1..=VM_DISKS_MAX))
        .prop_map(|(group, sequence, vm, disks)| SetVmRecord { group, sequence, vm, disks })
}

fn placement() -> impl Strategy<Value = PlacementRecord> {
    let nodes = prop::collection::vec("[a-zA-Z0-9._-]{1,64}", 24..=TABLE_NODES_MAX);
    (1..u32::MAX, id(), nodes, 1..=24u32, 0..=16u32).prop_map(
        |(pool, version, nodes, width, partitions)| PlacementRecord {
            pool,
            version,
            nodes,
            width,
            partitions: 1 << partitions,
        },
    )
}

fn part() -> impl Strategy<Value = PlacementPartRecord> {
    let rows = prop::collection::vec(0..TABLE_NODES_MAX as u32, 0..=PART_ROWS * 24);
    let from = prop::collection::vec(0..TABLE_NODES_MAX as u32, 1..=24);
    let moving = prop::collection::btree_map(0..PART_ROWS as u32, from, 0..=PART_ROWS);
    (1..u32::MAX, id(), 0..256u32, rows, moving).prop_map(|(pool, version, part, rows, moving)| {
        let moving = moving.into_iter().map(|(row, nodes)| MovingFrom { row, nodes }).collect();
        PlacementPartRecord { pool, version, part, rows, moving }
    })
}

fn comes_back<R: Record>(record: &R) -> Result<(), TestCaseError> {
    prop_assert_eq!(record.check(), Ok(()));
    let key = record.key();
    let stored = encode(record);
    prop_assert!(key.as_slice().len() <= crate::store::KEY_BYTES_MAX);
    prop_assert!(stored.len() <= crate::store::VALUE_BYTES_MAX, "{} bytes", stored.len());
    prop_assert_eq!(key.as_slice().first(), Some(&(R::KIND as u8)));
    let decoded = decode::<R>(&key, &stored);
    prop_assert_eq!(decoded.as_ref(), Ok(record));
    // Whatever is cut off, it is found.
    for len in [0, 3, 11, 12, stored.len() - 1] {
        prop_assert!(decode::<R>(&key, &stored[..len.min(stored.len() - 1)]).is_err());
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn images_come_back(record in image()) { comes_back(&record)?; }

    #[test]
    fn snapshots_come_back(record in snapshot()) { comes_back(&record)?; }

    #[test]
    fn what_a_vm_contributed_comes_back(record in set_vm()) { comes_back(&record)?; }

    #[test]
    fn placements_come_back(record in placement()) { comes_back(&record)?; }

    #[test]
    fn placement_parts_come_back(record in part()) { comes_back(&record)?; }

    #[test]
    fn small_records_come_back(
        text in name(), other in "\\PC{0,50}", a in id(), b in id(), c in id(), n in 1..u32::MAX,
        flag in any::<bool>(),
    ) {
        comes_back(&CounterRecord { counter: n % 4 + 1, given: a })?;
        comes_back(&ImageNameRecord { name: text.clone(), image_id: a })?;
        comes_back(&SetRecord {
            group: text.clone(), sequence: a - 1, expected_vms: n, created_unix_ms: b,
            holders: vec![text.clone()], obsolete: flag,
        })?;
        comes_back(&GroupRecord { name: text.clone(), last_sequence: b, keep_sets: n })?;
        comes_back(&PoolRecord {
            id: n,
            name: text.clone(),
            policy: "ec:4+2".to_owned(),
            partitions: 1024,
            compression: "adaptive".to_owned(),
        })?;
        comes_back(&PoolNameRecord { name: text.clone(), pool_id: n })?;
        comes_back(&NodeRecord {
            id: text.replace('+', "-").chars().take(64).collect(),
            address: other.clone(),
            domain: text.clone(),
            registered_unix_ms: c,
            last_seen_unix_ms: b,
            draining: flag,
            removed_unix_ms: a * u64::from(flag),
        })?;
        comes_back(&LeaseRecord {
            id: a, generation: b, holder: other, ttl_ms: c, expires_unix_ms: c, closed: flag,
        })?;
        comes_back(&LeaseWorkRecord { lease_id: a, image_id: b, number: c })?;
        comes_back(&RemovalRecord { image_id: a, marked: b })?;
        comes_back(&PinRecord {
            image_id: a, number: b, holder: text.clone(), image: text.clone(), created_unix_ms: c,
        })?;
        comes_back(&ReadTraceRecord {
            image_id: a, number: b, put_unix_ms: c,
            trace: Some(v1::ReadTrace::of((0..u64::from(n % 9) + 1).map(|i| i * (a % 1000) % 1000))),
        })?;
        comes_back(&DebtRecord {
            pool: n,
            partition: n % 1024,
            objects: a,
            since_unix_ms: b,
            missed_nodes: vec![format!("{a:032x}")],
        })?;
    }

    #[test]
    fn keys_sort_as_what_they_name(a in snapshot(), b in snapshot(), group in name(), n in any::<[u64; 2]>()) {
        prop_assert_eq!(
            a.key().cmp(&b.key()),
            (a.image_id, a.number).cmp(&(b.image_id, b.number))
        );
        prop_assert!(a.key().as_slice().starts_with(SnapshotRecord::prefix_of(a.image_id).as_slice()));
        // Newest first.
        prop_assert_eq!(
            SetRecord::key_of(&group, n[0]).cmp(&SetRecord::key_of(&group, n[1])),
            n[1].cmp(&n[0])
        );
    }

    #[test]
    fn any_flipped_bit_is_found(record in snapshot(), bit in any::<prop::sample::Index>()) {
        let stored = encode(&record);
        let bit = bit.index(stored.len() * 8);
        let mut bad = stored.to_vec();
        bad[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(decode::<SnapshotRecord>(&record.key(), &bad).is_err(), "bit {}", bit);
    }

    #[test]
    fn rubbish_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..200), record in image()) {
        let key = record.key();
        prop_assert!(decode::<ImageRecord>(&key, &bytes).is_err());
        // Even under a header that fits it is not believed unless it says what its key says.
        let stored = envelope(VERSION, KeyKind::Image as u8, &key, &bytes);
        if let Ok(found) = decode::<ImageRecord>(&key, &stored) {
            prop_assert_eq!(found.id, record.id);
            prop_assert_eq!(found.check(), Ok(()));
        }
    }
}

fn a_name() -> ImageNameRecord {
    ImageNameRecord { name: "base".to_owned(), image_id: 7 }
}

#[test]
fn a_value_under_another_key_is_refused() {
    let stored = encode(&a_name());
    let other = ImageNameRecord::key_of("other");
    assert!(decode::<ImageNameRecord>(&a_name().key(), &stored).is_ok());
    assert!(decode::<ImageNameRecord>(&other, &stored).is_err());
    // Also when it was summed for that key.
    let stored = envelope(VERSION, KeyKind::ImageName as u8, &other, &a_name().encode_to_vec());
    let error = decode::<ImageNameRecord>(&other, &stored).unwrap_err();
    assert!(error.to_string().contains("another key"), "{error}");
}

#[test]
fn a_newer_record_asks_for_an_upgrade() {
    let stored = envelope(VERSION + 1, KeyKind::ImageName as u8, &a_name().key(), b"??");
    let error = decode::<ImageNameRecord>(&a_name().key(), &stored).unwrap_err();
    assert_eq!(error, RecordError::Newer { key: a_name().key(), version: VERSION + 1 });
    assert!(error.to_string().contains("upgrade"), "{error}");
}

#[test]
fn a_record_that_breaks_the_rules_is_refused() {
    fn refused<R: Record>(record: &R) {
        let stored = envelope(VERSION, R::KIND as u8, &record.key(), &record.encode_to_vec());
        let error = decode::<R>(&record.key(), &stored).unwrap_err();
        assert!(matches!(error, RecordError::Damaged { .. }), "{record:?}");
    }
    let stable = v1::SnapshotState::Stable.into();
    let good = SnapshotRecord { image_id: 1, number: 1, state: stable, ..Default::default() };
    let root = v1::TreeRoot { size_bytes: 1, chunk_size: 65536, fan_out: 64, node: Bytes::new() };
    let bad_root = |root| SnapshotRecord { root: Some(root), ..good.clone() };
    let node = Bytes::from_static(b"short");
    refused(&good);
    refused(&SnapshotRecord { state: 99, ..bad_root(root.clone()) });
    refused(&SnapshotRecord { number: 0, ..bad_root(root.clone()) });
    refused(&bad_root(v1::TreeRoot { node, ..root.clone() }));
    refused(&bad_root(v1::TreeRoot { fan_out: 3, ..root.clone() }));
    refused(&bad_root(v1::TreeRoot { chunk_size: 1, ..root.clone() }));
    refused(&bad_root(v1::TreeRoot { size_bytes: u64::MAX, ..root }));
    refused(&ImageNameRecord { name: "../x".to_owned(), image_id: 7 });
    refused(&ImageNameRecord { name: "x".to_owned(), image_id: 0 });
    refused(&SetVmRecord { group: "g".to_owned(), vm: "v".to_owned(), ..Default::default() });
    let debt = DebtRecord { pool: 1, partition: 1, objects: 1, ..Default::default() };
    refused(&DebtRecord { partition: 1 << 16, ..debt.clone() });
    refused(&DebtRecord { objects: 0, ..debt.clone() });
    refused(&DebtRecord { missed_nodes: vec!["no id".into()], ..debt.clone() });
    refused(&DebtRecord { missed_nodes: vec![format!("{:032x}", 1); 49], ..debt });
    refused(&PlacementPartRecord {
        pool: 1,
        version: 1,
        part: 0,
        rows: vec![u32::MAX],
        ..Default::default()
    });
    let moving = |row, nodes| PlacementPartRecord {
        pool: 1,
        version: 1,
        moving: vec![MovingFrom { row, nodes }],
        ..Default::default()
    };
    refused(&moving(PART_ROWS as u32, vec![0]));
    refused(&moving(0, vec![]));
    refused(&moving(0, vec![u32::MAX]));
    refused(&ClusterRecord { id: "short".to_owned() });
}

fn line<R: Record>(record: &R) -> String {
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    let stored = encode(record);
    assert_eq!(decode::<R>(&record.key(), &stored).as_ref(), Ok(record));
    format!("{:?} {} {}\n", R::KIND, hex(record.key().as_slice()), hex(&stored))
}

/// One record of each kind, as version 1 of this program wrote it.
#[test]
fn golden_records_of_version_1() {
    let root = v1::TreeRoot {
        size_bytes: 10 << 30,
        chunk_size: 256 << 10,
        fan_out: 64,
        node: Bytes::from_static(&[0xab; 32]),
    };
    let lines = [
        line(&CounterRecord { counter: Counter::Generation as u32, given: 300 }),
        line(&ImageRecord {
            id: 7,
            name: "base".to_owned(),
            pool: 1,
            chunk_size: 256 << 10,
            created_unix_ms: 1_700_000_000_000,
            latest: 3,
            highest_number: 4,
            parent_image: 5,
            parent_snapshot: 6,
            writer: "host/disk".to_owned(),
            removed_unix_ms: 1_800_000_000_000,
            left_behind: 0,
        }),
        line(&a_name()),
        line(&SnapshotRecord {
            image_id: 7,
            number: 3,
            state: v1::SnapshotState::Stable.into(),
            root: Some(root),
            created_unix_ms: 1_700_000_000_001,
            stable_unix_ms: 1_700_000_000_002,
            stats: Some(v1::SnapshotStats { dirty_chunks: 9, ..Default::default() }),
            reason: "none".to_owned(),
            writer: "host/disk".to_owned(),
            lease_id: 0x1122_3344_5566_7788,
            obsolete_generation: 0,
        }),
        line(&SetRecord {
            group: "g".to_owned(),
            sequence: 2,
            expected_vms: 4,
            created_unix_ms: 8,
            ..SetRecord::default()
        }),
        line(&SetVmRecord {
            group: "g".to_owned(),
            sequence: 2,
            vm: "vm1".to_owned(),
            disks: vec![SetDisk {
                disk: "d".to_owned(),
                image: "i".to_owned(),
                image_id: 7,
                number: 3,
            }],
        }),
        line(&PoolRecord {
            id: 1,
            name: "default".to_owned(),
            policy: "replica:2".to_owned(),
            partitions: 1024,
            compression: "adaptive".to_owned(),
        }),
        line(&PoolNameRecord { name: "default".to_owned(), pool_id: 1 }),
        line(&NodeRecord {
            id: "00ff".to_owned(),
            address: "127.0.0.1:7000".to_owned(),
            domain: "rack-1".to_owned(),
            registered_unix_ms: 9,
            ..NodeRecord::default()
        }),
        line(&PlacementRecord {
            pool: 1,
            version: 1,
            nodes: vec!["00ff".to_owned(), "01ff".to_owned()],
            width: 2,
            partitions: 1024,
        }),
        line(&PlacementPartRecord {
            pool: 1,
            version: 1,
            part: 3,
            rows: vec![0, 1, 1, 0],
            moving: vec![],
        }),
        line(&LeaseRecord {
            id: 0x1122_3344_5566_7788,
            generation: 300,
            holder: "host".to_owned(),
            ttl_ms: 30_000,
            expires_unix_ms: 1_700_000_030_000,
            closed: true,
        }),
        line(&LeaseWorkRecord { lease_id: 0x1122_3344_5566_7788, image_id: 7, number: 3 }),
        line(&RemovalRecord { image_id: 7, marked: 2 }),
        line(&PinRecord {
            image_id: 7,
            number: 3,
            holder: "host/disk".to_owned(),
            image: "base".to_owned(),
            created_unix_ms: 1_700_000_000_003,
        }),
    ];
    let found = lines.concat();
    assert_eq!(found, include_str!("../../golden/records-v1.txt"), "this program writes:\n{found}");
}

/// What keeping and giving up sets has added.
#[test]
fn golden_records_of_sets() {
    let lines = [
        line(&SetRecord {
            group: "g".to_owned(),
            sequence: 2,
            expected_vms: 4,
            created_unix_ms: 8,
            holders: vec!["alice".to_owned(), "job 7".to_owned()],
            obsolete: true,
        }),
        line(&GroupRecord { name: "g".to_owned(), last_sequence: 2, keep_sets: 3 }),
    ];
    let found = lines.concat();
    let golden = include_str!("../../golden/records-v1-sets.txt");
    assert_eq!(found, golden, "this program writes:\n{found}");
}

/// What reading ahead has added.
#[test]
fn golden_records_of_read_traces() {
    let found = line(&ReadTraceRecord {
        image_id: 7,
        number: 3,
        trace: Some(v1::ReadTrace::of([0, 1, 2, 900, 901, 40])),
        put_unix_ms: 1_700_000_000_000,
    });
    let golden = include_str!("../../golden/records-v1-traces.txt");
    assert_eq!(found, golden, "this program writes:\n{found}");
}

/// What membership, placement that moves and debt have added since; none of it changes what the
/// first golden file holds.
#[test]
fn golden_records_of_members() {
    let lines = [
        line(&DebtRecord {
            pool: 1,
            partition: 900,
            objects: 12,
            since_unix_ms: 1_700_000_000_000,
            missed_nodes: Vec::new(),
        }),
        line(&NodeRecord {
            id: "00ff".to_owned(),
            address: "127.0.0.1:7000".to_owned(),
            domain: "rack-1".to_owned(),
            registered_unix_ms: 9,
            last_seen_unix_ms: 1_700_000_000_000,
            draining: true,
            removed_unix_ms: 1_700_000_000_001,
        }),
        line(&PlacementPartRecord {
            pool: 1,
            version: 2,
            part: 3,
            rows: vec![0, 1, 1, 0],
            moving: vec![MovingFrom { row: 1, nodes: vec![2, 3] }],
        }),
        line(&ClusterRecord { id: "0123456789abcdef0123456789abcdef".to_owned() }),
    ];
    let found = lines.concat();
    let golden = include_str!("../../golden/records-v1-members.txt");
    assert_eq!(found, golden, "this program writes:\n{found}");
}

/// What repair has added since.
#[test]
fn golden_records_of_repair() {
    let repair = v1::RepairProgress {
        running_ms: 5000,
        partitions_total: 9,
        partitions_done: 4,
        copied_records: 100,
        copied_bytes: 7_000_000,
        bytes_per_second: 1_000_000,
        remaining_ms: 9000,
        waits_for: "node 00ff".to_owned(),
    };
    let scrub = v1::ScrubProgress {
        under_way: true,
        pool: 2,
        partition: 77,
        damaged_records: 1,
        lost_records: 2,
    };
    let lines = [
        line(&DebtRecord {
            pool: 1,
            partition: 900,
            objects: 12,
            since_unix_ms: 1_700_000_000_000,
            missed_nodes: vec!["00ff".to_owned(), "01ff".to_owned()],
        }),
        line(&StewardRecord {
            holder: "host/1".to_owned(),
            seen_unix_ms: 1_700_000_000_002,
            repair: Some(repair),
            scrub: Some(scrub),
        }),
    ];
    let found = lines.concat();
    let golden = include_str!("../../golden/records-v1-repair.txt");
    assert_eq!(found, golden, "this program writes:\n{found}");
}
