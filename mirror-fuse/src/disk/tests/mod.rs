mod cases;
mod crash_files;
mod model;
pub(super) mod support;
