"""Each row of docs/faults.md has tests, which are listed here by its number."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAST = 60

OPTIM, STATES, CLIPPING = (
    f"tests/optim/test_{each}.py" for each in ("optim", "states", "clipping")
)
GRADIENTS, TRAINERS = "tests/optim/test_gradients.py", "tests/optim/test_trainer_examples.py"
MASKS, FILES, VECTORS, EXPORTS, PATCHES = (
    "tests/masks/test_masks.py",
    *(f"tests/task_vectors/test_{each}.py" for each in ("files", "task_vectors", "exports")),
    "tests/task_vectors/test_patches.py",
)
ROUNDS, REFUSALS = (f"tests/calibration/test_{each}.py" for each in ("rounds", "refusals"))
NAMES, CHECKPOINT, LINES = (
    "tests/test_names.py",
    "tests/files/test_checkpoint.py",
    "tests/app/test_wrong_lines.py",
)
CHECKPOINTS, KILLS = (f"tests/training/test_{each}.py" for each in ("checkpoints", "kills"))
REFUSED, FUZZ, LIES, LARGE = (
    f"tests/faults/test_{each}.py" for each in ("refused", "fuzz", "lies", "large")
)
FSDP, DDP, RANKS, MANY = (
    f"tests/distributed/test_{each}.py" for each in ("fsdp", "ddp", "calibration", "distributed")
)
KERNELS = "tests/kernels/test_"

TESTS: dict[int, tuple[tuple[str, str], ...]] = {
    1: ((OPTIM, "test_masks_that_do_not_fit_the_model"), (VECTORS, "test_from_models_refuses")),
    2: ((OPTIM, "test_freezing_and_release"), (OPTIM, "test_bad_arguments")),
    3: ((REFUSED, "test_a_mask_that_does_not_fit_is_refused_and_the_model_stays"),),
    4: ((MASKS, "test_from_dense_accepts_exact_zeros_and_ones_only"),),
    5: (
        (MASKS, "test_density_that_selects_nothing"),
        (OPTIM, "test_masks_that_do_not_fit_the_model"),
    ),
    6: ((REFUSED, "test_an_empty_tensor_of_a_mask_is_frozen_and_has_no_state"),),
    7: (
        (OPTIM, "test_a_full_mask_follows_adamw"),
        (f"{KERNELS}csrc.py", "test_a_full_mask_is_torch_adamw_within_two_ulp"),
    ),
    8: ((OPTIM, "test_a_single_entry_at_either_end"),),
    9: ((MASKS, "test_density_out_of_range"), (ROUNDS, "test_bad_arguments_are_refused")),
    10: (
        (OPTIM, "test_bad_arguments"),
        (REFUSED, "test_rates_out_of_range_name_value_and_range"),
    ),
    11: ((OPTIM, "test_unselected_entries_never_change_a_bit"),),
    12: (
        (OPTIM, "test_nan_at_a_selected_entry_stays_in_its_entry"),
        (REFUSED, "test_a_norm_that_is_not_finite_is_refused_before_a_gradient_is_scaled"),
    ),
    13: (
        (MASKS, "test_a_bad_score_is_named"),
        (REFUSALS, "test_scores_that_overflow_are_refused_by_name"),
    ),
    14: (
        (MASKS, "test_all_scores_equal_warns_and_still_selects_exactly_k"),
        (MASKS, "test_ties_are_taken_in_tensor_and_position_order"),
    ),
    15: (
        (ROUNDS, "test_bad_arguments_are_refused"),
        (ROUNDS, "test_few_samples_and_equal_scores_warn"),
    ),
    16: ((OPTIM, "test_a_gradient_of_none_keeps_the_tensor_and_its_counter"),),
    17: ((OPTIM, "test_changes_behind_its_back_are_refused_before_any_write"),),
    18: (
        (REFUSED, "test_a_gradient_in_another_dtype_steps_as_its_cast_does"),
        (GRADIENTS, "test_with_bf16_weights_the_compact_gradient_is_float32"),
    ),
    19: (
        (OPTIM, "test_layouts_and_dtypes_of_gradients_and_parameters"),
        (OPTIM, "test_expanded_gradients_are_clipped"),
    ),
    20: ((OPTIM, "test_a_parameter_inside_a_larger_buffer_leaves_its_neighbours"),),
    21: ((OPTIM, "test_changes_behind_its_back_are_refused_before_any_write"),),
    22: (
        (STATES, "test_a_cast_before_the_first_step_is_followed"),
        (STATES, "test_a_cast_after_the_first_step_is_refused"),
    ),
    23: ((OPTIM, "test_zero_size_and_scalar_parameters"),),
    24: ((OPTIM, "test_masks_that_do_not_fit_the_model"),),
    25: (
        (REFUSED, "test_a_mask_that_does_not_fit_is_refused_and_the_model_stays"),
        (OPTIM, "test_masks_that_do_not_fit_the_model"),
    ),
    26: (
        (OPTIM, "test_round_trips_in_mid_training_change_no_bit"),
        (OPTIM, "test_state_is_eight_bytes_an_entry_and_twelve_with_a_master"),
        (CHECKPOINTS, "test_every_method_resumes_with_the_same_bits"),
    ),
    27: (
        (OPTIM, "test_a_tied_parameter_is_updated_once_under_either_name"),
        (VECTORS, "test_tied_weights_are_edited_once_by_either_name"),
    ),
    28: ((OPTIM, "test_names_and_groups_that_collide_are_refused_before_anything_is_frozen"),),
    29: (
        (REFUSED, "test_a_mask_that_does_not_fit_is_refused_and_the_model_stays"),
        (REFUSED, "test_a_vector_of_split_weights_is_refused_by_a_fused_one_unless_it_is_renamed"),
    ),
    30: ((TRAINERS, "test_a_mask_of_the_base_is_refused_by_a_model_with_an_adapter"),),
    31: (
        (REFUSED, "test_a_mask_that_does_not_fit_is_refused_and_the_model_stays"),
        (REFUSED, "test_a_selected_weight_that_is_frozen_later_is_not_decayed"),
    ),
    32: (
        (NAMES, "test_names_are_free_of_wrappers"),
        (STATES, "test_names_of_a_wrapped_model_fit"),
        (VECTORS, "test_names_of_wrapped_models_are_those_of_the_model"),
    ),
    33: ((NAMES, "test_names_are_free_of_wrappers"),),
    34: ((FSDP, "test_sharded_training_equals_one_process"),),
    35: (
        (FSDP, "test_an_optimizer_is_made_before_or_after_sharding_and_not_too_late"),
        (OPTIM, "test_data_parallel_wrapping_must_come_after"),
    ),
    36: (
        (FSDP, "test_an_optimizer_is_made_before_or_after_sharding_and_not_too_late"),
        (DDP, "test_wrong_uses_are_refused_on_every_rank"),
    ),
    37: ((FSDP, "test_a_checkpoint_goes_from_one_number_of_ranks_to_another"),),
    38: (
        (MANY, "test_an_error_of_one_rank_is_raised_on_all"),
        (RANKS, "test_ranks_that_differ_or_fail_raise_on_all_of_them"),
    ),
    39: (
        (CHECKPOINTS, "test_every_method_resumes_with_the_same_bits"),
        (TRAINERS, "test_an_example_ends_with_the_plain_loops_bits"),
    ),
    40: ((OPTIM, "test_grad_scaler_with_skipped_steps"),),
    41: (
        (CLIPPING, "test_the_bits_are_those_of_clipping_at_once"),
        (OPTIM, "test_grad_scaler_with_unscale_and_clipping"),
    ),
    42: ((OPTIM, "test_the_state_of_another_mask_is_refused"),),
    43: ((OPTIM, "test_a_state_of_the_wrong_form_is_refused"),),
    44: ((FSDP, "test_a_checkpoint_goes_from_one_number_of_ranks_to_another"),),
    45: (
        (FILES, "test_truncated_at_every_byte"),
        (CHECKPOINT, "test_a_file_cut_at_any_byte_is_refused"),
    ),
    46: (
        (FILES, "test_a_header_that_lies"),
        (FILES, "test_a_header_that_is_none"),
        (FILES, "test_loading_takes_the_memory_of_the_file_and_its_largest_tensor"),
        (FUZZ, "test_a_damaged_file_loads_as_it_was_or_is_refused"),
        (LIES, "test_a_small_file_takes_little_memory_whatever_it_claims"),
    ),
    47: ((FILES, "test_a_random_bit_of_every_byte"),),
    48: (
        (FILES, "test_content_that_lies_behind_right_checksums"),
        (f"{KERNELS}index.py", "test_buffers_of_a_damaged_file_are_refused"),
    ),
    49: ((FILES, "test_content_that_lies_behind_right_checksums"),),
    50: (
        (FILES, "test_content_that_lies_behind_right_checksums"),
        (FILES, "test_save_refuses_what_a_file_cannot_hold"),
    ),
    51: (
        (FILES, "test_content_that_lies_behind_right_checksums"),
        (PATCHES, "test_gaps_whose_sum_needs_more_than_63_bits_are_refused"),
    ),
    52: (
        (FILES, "test_metadata_that_lies"),
        (LIES, "test_a_checkpoint_that_lies_is_refused"),
    ),
    53: (
        (VECTORS, "test_another_base_is_refused_unless_forced"),
        (REFUSED, "test_both_fingerprints_of_another_base_are_named_and_force_edits_it"),
    ),
    54: (
        (VECTORS, "test_vectors_of_two_bases_are_not_summed"),
        (VECTORS, "test_sums_over_different_masks"),
        (VECTORS, "test_sums_are_float32"),
    ),
    55: ((FILES, "test_other_formats_are_named_and_never_unpickled"),),
    56: (
        (CHECKPOINT, "test_damage_is_refused"),
        (EXPORTS, "test_links_are_followed_in_the_hub_s_cache_and_nowhere_else"),
        (EXPORTS, "test_a_place_that_is_taken_is_refused"),
        (LINES, "test_a_wrong_line_is_told_by_its_option"),
    ),
    57: (
        (FILES, "test_killed_at_any_moment"),
        (KILLS, "test_killed_at_every_call_that_changes_the_folder"),
        (KILLS, "test_killed_at_any_moment"),
    ),
    58: (
        (FILES, "test_a_full_disk"),
        (FILES, "test_a_failed_write_leaves_the_old_file_alone"),
        (EXPORTS, "test_a_disk_that_is_full_at_any_byte_leaves_nothing"),
    ),
    59: (
        (FILES, "test_two_writers_and_a_reader"),
        (EXPORTS, "test_of_two_writers_the_first_one_wins"),
    ),
    60: (
        (LARGE, "test_entries_on_both_sides_of_two_to_the_31_are_written_and_no_other"),
        (f"{KERNELS}aot.py", "test_blocks_are_placed_by_64_bit_multiplications"),
        (f"{KERNELS}triton.py", "test_offsets_past_32_bits"),
        (f"{KERNELS}index.py", "test_positions_beyond_two_to_the_31"),
    ),
}


@cache
def tests_in(path: str) -> dict[str, str]:
    """Return the source of each test of a file, with its decorators, by name."""
    text = (ROOT / path).read_text()
    return {
        node.name: "\n".join(ast.unparse(each) for each in (*node.decorator_list, node))
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_the_page_and_the_table_have_every_row_once() -> None:
    page = (ROOT / "docs" / "faults.md").read_text()
    rows = [int(number) for number in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)]
    assert sorted(rows) == list(range(1, LAST + 1)) == sorted(TESTS)


@pytest.mark.parametrize("row", TESTS)
def test_the_tests_of_a_row_are_there_and_run(row: int) -> None:
    assert TESTS[row]
    for path, name in TESTS[row]:
        source = tests_in(path).get(name)
        assert source, f"{path} has no {name}"
        assert "pytest.mark.skip(" not in source
        assert "xfail" not in source
