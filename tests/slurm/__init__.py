"""The launch scripts on a real SLURM (cluster.sh) with the real trainer and the embedded model. What is
shown, and where:

(test_queue.py and test_nodes.py are about what lies around the trainer: their ranks run stubs/trainer.py, but
in the array.)

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
  a step that srun refuses                             test_a_step_that_srun_refuses_is_bad_input
  slices of a GPU (MIG): several ranks refused         test_ranks_on_slices_of_a_gpu_are_refused
  an image that cannot be started                      test_an_image_that_cannot_be_started_is_bad_input
  a run folder whose job waits in the queue            test_an_owner_that_will_go_on_is_respected
  squeue does not answer: 75, the folder untouched     test_a_scheduler_that_does_not_answer_never_means_that_the_folder_is_free
what a job is given
  nodes with different numbers of CPUs                 test_nodes_with_different_numbers_of_cpus
  fewer CPUs than ranks                                test_more_ranks_than_cpus_share_them
  --gpus without a number per node                     test_gpus_asked_for_in_all
  an exclusive node with more GPUs than asked for      test_an_exclusive_node_gives_the_gpus_that_were_asked_for
  a typed GRES, one slice and one rank                 test_ranks_on_slices_of_a_gpu_are_refused
  leftovers of an outer job in the environment         test_leftovers_of_an_outer_job_are_ignored
  pyxis; apptainer (stubs that record their calls)     test_pyxis_runs_every_step_in_the_image
                                                       test_apptainer_runs_every_rank_in_the_file
  records without secrets, mode 600                    test_records_are_private_and_without_secrets
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
  a task of an array goes back alone                   test_tasks_of_an_array_are_runs_of_their_own
  stops without progress are bounded                   test_stops_without_progress_are_bounded
  SLURM's own requeues without progress are bounded    test_requeues_by_slurm_without_progress_are_bounded
  node checks that are cut off are bounded             test_node_checks_that_are_cut_off_are_bounded
  a crash beside a dead node comes back                test_a_crash_beside_a_dead_node_goes_back_into_the_queue
  ids that start again                                 test_ids_that_start_again_are_other_jobs
  no process, GPU, port or shared memory left          after every test (conftest.py). The GPUs are SLURM's books here: they lie
                                                       behind /dev/null, which everybody holds open

How long a check takes is not asserted: on a machine that others share the clock says more about them.
"""
