//! The name by which programs find the library at run time: its number is that of the layout.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libblobcr.so.1");
}
