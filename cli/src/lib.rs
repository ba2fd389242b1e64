//! The blobcr command: every role and every operator verb.
