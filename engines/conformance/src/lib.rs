//! What every storage engine must do, as tests, and three engines that help to test others.
//!
//! [`suite!`] expands to one `#[test]` a case, in the crate of the engine under test:
//!
//! ```ignore
//! mod conformance {
//!     // files under `dir`; called again on the same `dir` to reopen
//!     engine_conformance::suite!(|dir: &std::path::Path| crate::Disky::open(dir).unwrap());
//! }
//! mod in_memory {
//!     // no files: the cases that reopen or crash show up as ignored
//!     engine_conformance::suite!(|_: &std::path::Path| crate::Memory::new(), persistent: false);
//! }
//! ```
//!
//! An engine that promises that buffered commits survive an orderly drop adds
//! `buffered_survives_drop: true` and gets that tested, too.
//!
//! The crash cases kill a writer, or take the power from it, some 30 times each. More are a matter of time:
//!
//! ```text
//! ENGINE_CRASH_ROUNDS=500 cargo test -p 'engine-*' -- kill_keeps power_loss_keeps
//! ```
//!
//! and `ENGINE_SEED` chooses others.
//!
//! Options that change what an engine writes when (a small cache, another way to sync) deserve crashes of their
//! own: a module with `suite!(open_so, crash_only: true)`.
//!
//! [`Model`] is an engine too simple to be wrong, [`Mirror`] runs two engines and stops at the first
//! difference, [`Failing`] breaks at a chosen commit.

pub mod cases;
pub mod crash;
mod failing;
mod mirror;
mod model;
#[cfg(target_os = "linux")]
pub mod power_loss;
mod seeds;
mod spawn;

pub use engine_powerloss::Rng;
pub use failing::Failing;
pub use mirror::Mirror;
pub use model::Model;
pub use spawn::undisturbed;

/// The tests that an engine must pass; see the crate's documentation.
#[macro_export]
macro_rules! suite {
    ($open:expr $(,)?) => {
        $crate::suite!(@memory $open);
        $crate::suite!(@files $open, );
    };
    ($open:expr, buffered_survives_drop: true $(,)?) => {
        $crate::suite!(@memory $open);
        $crate::suite!(@files $open, );

        #[test]
        fn buffered_survives_an_orderly_drop() {
            $crate::cases::buffered_survives_an_orderly_drop($crate::undisturbed($open));
        }
    };
    ($open:expr, persistent: false $(,)?) => {
        $crate::suite!(@memory $open);
        $crate::suite!(@files $open, #[ignore = "this engine keeps nothing on disk"]);
    };
    ($open:expr, crash_only: true $(,)?) => {
        $crate::suite!(@crash $open, );
    };
    (@files $open:expr, $(#[$skip:meta])?) => {
        $crate::suite!(@case $open, durable_survives_reopening $(#[$skip])?);
        $crate::suite!(@case $open, buffered_before_durable_survives_reopening $(#[$skip])?);
        $crate::suite!(@case $open, random_operations_with_reopening $(#[$skip])?);
        $crate::suite!(@case $open, reclaimed_state_survives_reopening $(#[$skip])?);

        $crate::suite!(@crash $open, $(#[$skip])?);
    };
    (@crash $open:expr, $(#[$skip:meta])?) => {
        #[test]
        $(#[$skip])?
        fn kill_keeps_what_was_acknowledged() {
            $crate::crash::kill_keeps_what_was_acknowledged(
                module_path!(),
                $crate::undisturbed($open),
            );
        }

        #[cfg(target_os = "linux")]
        #[test]
        $(#[$skip])?
        fn power_loss_keeps_what_was_durable() {
            $crate::power_loss::power_loss_keeps_what_was_durable(
                module_path!(),
                $crate::undisturbed($open),
            );
        }

        /// The process that the cases above start.
        #[test]
        #[ignore = "started by the crash cases"]
        fn crash_writer() {
            $crate::crash::writer($open);
        }
    };
    (@memory $open:expr) => {
        $crate::suite!(@case $open, never_written_tables_are_empty);
        $crate::suite!(@case $open, batch_is_visible_whole);
        $crate::suite!(@case $open, later_operations_of_a_batch_win);
        $crate::suite!(@case $open, tables_are_separate);
        $crate::suite!(@case $open, deleting_an_absent_key_changes_nothing);
        $crate::suite!(@case $open, view_ignores_later_commits);
        $crate::suite!(@case $open, view_outlives_many_commits);
        $crate::suite!(@case $open, views_of_several_ages_agree_with_their_moment);
        $crate::suite!(@case $open, threads_see_whole_batches_in_order);
        $crate::suite!(@case $open, scan_follows_byte_order);
        $crate::suite!(@case $open, scan_respects_every_kind_of_bound);
        $crate::suite!(@case $open, scan_stops_when_told);
        $crate::suite!(@case $open, last_is_the_greatest_key);
        $crate::suite!(@case $open, keys_may_hold_any_byte);
        $crate::suite!(@case $open, empty_values_are_kept);
        $crate::suite!(@case $open, empty_keys_are_refused);
        $crate::suite!(@case $open, large_values_are_kept);
        $crate::suite!(@case $open, large_batches_apply_whole);
        $crate::suite!(@case $open, appends_mix_with_other_writes);
        $crate::suite!(@case $open, empty_batches_commit);
        $crate::suite!(@case $open, random_operations_match_the_model);
        $crate::suite!(@case $open, sizes_follow_the_content);
        $crate::suite!(@case $open, reclaim_gives_space_back);
        $crate::suite!(@case $open, reclaim_of_an_empty_engine);
        $crate::suite!(@case $open, view_outlives_reclaim);
        $crate::suite!(@case $open, commits_and_reads_go_on_during_reclaim);
        $crate::suite!(@case $open, cancelled_reclaim_changes_nothing);
    };
    (@case $open:expr, $name:ident $(#[$skip:meta])?) => {
        #[test]
        $(#[$skip])?
        fn $name() {
            $crate::cases::$name($crate::undisturbed($open));
        }
    };
}

#[cfg(test)]
mod tests {
    mod model {
        crate::suite!(|_: &std::path::Path| crate::Model::default(), persistent: false);
    }
    mod mirror {
        crate::suite!(
            |_: &std::path::Path| crate::Mirror::new(
                crate::Model::default(),
                crate::Model::default()
            ),
            persistent: false
        );
    }
}
