//! Tests of the envelope that all records share.
