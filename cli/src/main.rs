//! The `blobcr` command. Everything is in the library.

// Chunk buffers are 256 KiB and short-lived: glibc maps and unmaps each of them and pays a page
// fault for every 4 KiB, which halves what a core can send. jemalloc keeps them.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> std::process::ExitCode {
    blobcr_cli::main()
}
