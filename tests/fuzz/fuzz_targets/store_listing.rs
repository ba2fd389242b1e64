#![no_main]
blobcr_fuzz::target!(blobcr_fuzz::store::LISTING);
