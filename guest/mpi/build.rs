//! The name by which programs find the library at run time: its number is that of the interface.

fn main() {
    // What crates export for C of their own stays inside.
    println!("cargo::rustc-cdylib-link-arg=-Wl,--exclude-libs,ALL");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libblobcr_mpi.so.1");
}
