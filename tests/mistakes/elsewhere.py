"""Mistakes and mishaps that take more than one command to show: where their tests are, by the row of the table."""

from __future__ import annotations

RUNNER, CLUSTER, MAIN = "pipeline/run/test_runner.py", "pipeline/run/test_cluster.py", "pipeline/cli/test_main.py"
CUT_SHORT = "pipeline/run/test_runs_cut_short.py"
TRACKING = "pipeline/run/tracking/test_tracker.py"
REPLAY = "stages/pretrain/launch/test_replay.py"

ELSEWHERE = {
    24: [f"{CUT_SHORT}::test_a_disk_that_fills_up_stops_the_stage_and_leaves_no_half_of_it"],
    37: [
        f"{CLUSTER}::test_what_answers_but_is_no_ray_is_said_in_time",
        f"{CLUSTER}::test_a_cluster_that_refuses_or_does_not_fit",
    ],
    40: [
        f"{RUNNER}::test_an_interrupt_is_clean",
        f"{RUNNER}::test_after_kill_9_the_same_command_completes",
        f"{RUNNER}::test_two_runs_at_once_compute_every_stage_once",
        f"{CLUSTER}::test_an_interrupt_that_ray_gets_as_well_is_clean",
        f"{CUT_SHORT}::test_a_disk_that_fills_up_stops_the_stage_and_leaves_no_half_of_it",
        f"{CUT_SHORT}::test_a_store_that_is_deleted_in_the_middle_stops_the_stage_that_writes",
        f"{CUT_SHORT}::test_inputs_that_are_deleted_in_the_middle_stop_the_stage_that_reads",
        "test_killed_run.py::test_killed_at_random_moments_and_run_again",
    ],
    41: [
        "test_mistakes_paths.py::test_41_a_source_is_found_as_it_is_written",
        "test_mistakes_paths.py::test_41_a_store_in_the_home_and_a_file_in_another_folder",
        "test_mistakes_paths.py::test_41_a_relative_path_is_of_the_working_folder_and_the_message_says_so",
    ],
    42: [
        f"{TRACKING}::test_a_dead_server_costs_one_warning_and_no_result",
        f"{TRACKING}::test_a_server_that_never_answers_does_not_hang_the_run",
        f"{TRACKING}::test_tracking_that_breaks_in_the_middle_is_told_once",
    ],
    43: ["test_mistakes_packages.py::test_43_a_plug_in_that_cannot_be_imported"],
    44: [
        f"{REPLAY}::test_a_learning_rate_of_1000_names_the_term_and_the_command",
        f"{REPLAY}::test_a_collapse_leaves_a_file_that_replays_its_step",
    ],
    45: [
        f"{MAIN}::test_gc_while_a_run_goes_on_keeps_what_it_reads_and_writes",
        f"{MAIN}::test_gc_leaves_what_another_pipeline_made_or_used",
        f"{MAIN}::test_gc_asks_before_it_removes_artifacts",
        f"{MAIN}::test_verify_does_not_call_an_artifact_damaged_that_is_replaced_meanwhile",
    ],
    47: ["test_makefile.py::test_a_python_that_does_not_fit_is_named"],
}
