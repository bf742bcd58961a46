//! What `bench engines` and `bench server` have measured: one model, shown as a table, as JSON and as a page.

pub mod chart;
pub mod html;
pub mod json;
pub mod model;
pub mod table;
