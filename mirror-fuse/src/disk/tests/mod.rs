mod cases;
pub(super) mod support;
