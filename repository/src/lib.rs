//! The library through which every part reads and writes the repository.

pub mod catalog;
pub mod store;

pub use catalog::{Catalog, CatalogError};
pub use store::{Object, ObjectStore, StoreError, Stored};
