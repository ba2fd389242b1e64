mod cases;
mod cold;
mod crash_files;
mod killed;
mod model;
pub(super) mod support;
mod torture;
