//! Whether the structures are those of the header: a C program prints what its compiler makes of
//! each field.

use std::fmt::Write;
use std::path::Path;
use std::process::Command;

use crate::abi::{Disk, Options, Set, Snapshot, Taken, Vm};

macro_rules! layout {
    ($c:ident, $rust:ident: $($field:ident),*) => {
        (
            stringify!($c),
            size_of::<$rust>(),
            vec![$((stringify!($field), std::mem::offset_of!($rust, $field))),*],
        )
    };
}

#[test]
fn structures_are_those_of_the_header() {
    let ours = [
        layout!(blobcr_options, Options: version, size, flags, timeout_ms, port, connect, vm,
            token_file, socket, key, group, sequence, expected_vms, reserved),
        layout!(blobcr_snapshot, Snapshot: disk, image, image_id, number, dirty_bytes, downtime_ns,
            state, reserved),
        layout!(blobcr_result, Taken: version, size, count, reserved, flush_ns, call_ns, vm,
            snapshots),
        layout!(blobcr_disk, Disk: disk, checkpoint_image, size_bytes, dirty_bytes, last_stable,
            pending, stalled),
        layout!(blobcr_vm, Vm: version, size, count, group_count, vm, group, disks),
        layout!(blobcr_set, Set: version, size, sequence, expected_vms, joined_vms, state, reserved,
            group),
    ];
    let mut program = String::from(
        "#include <blobcr-guest.h>\n#include <stddef.h>\n#include <stdio.h>\nint main(void) {\n",
    );
    let mut expected = String::new();
    for (name, size, fields) in &ours {
        writeln!(program, "printf(\"{name} %zu\\n\", sizeof(struct {name}));").unwrap();
        writeln!(expected, "{name} {size}").unwrap();
        for (field, offset) in fields {
            writeln!(
                program,
                "printf(\"{name}.{field} %zu\\n\", offsetof(struct {name}, {field}));"
            )
            .unwrap();
            writeln!(expected, "{name}.{field} {offset}").unwrap();
        }
    }
    program.push_str("return 0;\n}\n");
    let dir = tempfile::tempdir().unwrap();
    let (source, binary) = (dir.path().join("layout.c"), dir.path().join("layout"));
    std::fs::write(&source, program).unwrap();
    let include = Path::new(env!("CARGO_MANIFEST_DIR")).join("../include");
    let status = Command::new("cc")
        .args(["-std=c99", "-Wall", "-Wextra", "-Werror", "-I"])
        .arg(include)
        .arg(&source)
        .arg("-o")
        .arg(&binary)
        .status()
        .expect("no C compiler; tests/setup.sh installs one");
    assert!(status.success());
    let printed = Command::new(binary).output().unwrap().stdout;
    assert_eq!(String::from_utf8(printed).unwrap(), expected);
}
