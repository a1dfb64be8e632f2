"""The launch scripts on a real SLURM (cluster.sh) with the real trainer and the embedded model. What is shown, and where:

submission
  script accepted unmodified                           test_scripts_are_accepted_unmodified
  9 GPUs, 3 nodes, an unknown partition rejected       test_sbatch_refuses_what_the_cluster_has_not
  a cluster without GRES, and the override             test_a_cluster_without_gres_takes_the_override
  submitted from another directory                     every test: each submits from a folder of its own
  --export=NONE                                        test_arguments_arrive_unsplit_with_an_empty_environment
  arguments with spaces                                test_arguments_arrive_unsplit_with_an_empty_environment
  environment and sbatch options win (-N, -t, -J)      test_options_and_environment_of_sbatch_win_over_the_script
checks: exit 2, no restart, nothing started
  tp against world size; tp against heads; no model    test_bad_input_ends_before_any_node_is_asked
  another configuration in an old run folder           test_bad_input_ends_before_any_node_is_asked
  fewer GPUs, imports, disk: the node is named         test_each_node_is_checked_and_named
  a run folder that is not shared                      test_a_run_folder_that_is_not_shared_is_refused
  a run folder that another job runs in                test_a_run_folder_in_use_is_refused
  a dry run starts nothing                             test_a_dry_run_on_the_login_node_submits_nothing
runs
  1 node x 2 ranks to the end                          test_arguments_arrive_unsplit_with_an_empty_environment
  2 nodes x 1 rank to the end                          test_a_run_leaves_what_reproduces_it
  two jobs on one set of nodes                         test_two_jobs_on_the_same_nodes_do_not_meet
  the trainer's exit code is the job's                 test_crash_restarts_after_progress_and_stops_at_the_same_place
  a rank hangs                                         test_a_hung_rank_ends_the_job
  all ranks' logs, all attempts in one output file     test_signals_in_every_phase_chain_to_the_same_weights
stop and resume: the weights are those of the run that nothing disturbed
  USR1 in start-up, evaluation, rollout (twice),
    training, swap, saving                             test_signals_in_every_phase_chain_to_the_same_weights
  a real time limit                                    test_real_time_limit
  USR2; --no-requeue: 75 and a message                 test_stopped_for_good_and_gone_on_with_by_the_next_job_of_its_name
  two jobs of one name, one after the other            test_stopped_for_good_and_gone_on_with_by_the_next_job_of_its_name
                                                       test_two_jobs_of_one_name_run_one_after_the_other
  scancel never comes back                             test_scancel_never_comes_back
  preemption with grace                                test_preemption_with_grace_saves_and_comes_back
  preemption by the job's own signal                   test_preemption_that_sends_the_jobs_own_signal
  a save longer than the grace                         test_save_longer_than_the_grace_keeps_the_previous_checkpoint
  a node crashes                                       test_node_crash_resumes_from_the_last_checkpoint
  a crash after progress restarts, at the same
    place twice it stops                               test_crash_restarts_after_progress_and_stops_at_the_same_place
  a crash before any checkpoint does not loop          test_crash_before_any_checkpoint_does_not_loop
                                                       test_a_killed_rank_is_named_though_it_could_not_say_anything
  no process, GPU, port or shared memory left          after every test (conftest.py). The GPUs are SLURM's books here: they lie
                                                       behind /dev/null, which everybody holds open

How long a check takes is not asserted: on a machine that others share the clock says more about them.
"""
