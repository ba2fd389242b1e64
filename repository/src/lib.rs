//! The library through which every part reads and writes the repository.

pub mod catalog;
pub mod store;
pub mod tree;

pub use catalog::{Catalog, CatalogError};
pub use store::{Object, ObjectStore, StoreError, Stored};
