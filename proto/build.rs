//! Compiles the `.proto` files without an installed `protoc`.

const FILES: [&str; 4] = [
    "proto/blobcr/v1/records.proto",
    "proto/blobcr/v1/metadata.proto",
    "proto/blobcr/v1/mirror.proto",
    "proto/blobcr/v1/checkpoint.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(FILES, ["proto"])?;
    let grpc = std::env::var_os("CARGO_FEATURE_GRPC").is_some();
    tonic_prost_build::configure()
        .build_client(grpc)
        .build_server(grpc)
        .codec_path("crate::exact::ExactCodec")
        // Payloads become slices of the received frame instead of copies.
        .bytes(".")
        .compile_fds(descriptors)?;
    Ok(())
}
