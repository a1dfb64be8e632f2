"""The tests of tests/unit/ops that take a placement, collected once more with this folder's placements: a
GPU's."""

from tests.unit.ops.test_block_copy import (  # noqa: F401
    test_blocks_land_where_slicing_puts_them,
    test_checksums_are_those_of_the_bits,
    test_long_aligned_and_vector_blocks,
)
from tests.unit.ops.test_common_offset import (  # noqa: F401
    test_log_p_entropy_and_gradient,
    test_overwriting_ops,
    test_shards_join_without_loss,
)
from tests.unit.ops.test_custom_ops import (  # noqa: F401
    test_compiled_without_a_graph_break_gives_the_same_gradient,
    test_opcheck,
)
from tests.unit.ops.test_linear_token_log_probs import (
    test_values_and_gradients_agree_with_float64 as test_linear_token_log_probs,  # noqa: F401
)
from tests.unit.ops.test_linear_weighted_loss import (  # noqa: F401
    test_loss_and_gradients_agree_with_float64,
)
from tests.unit.ops.test_not_finite import (  # noqa: F401
    test_a_nan_hidden_state_makes_the_loss_nan,
    test_log_p_and_its_gradient_are_nan_where_log_softmax_is,
    test_one_rank_of_three_spoils_its_tokens_on_every_rank,
    test_overwriting_ops_keep_nan,
)
from tests.unit.ops.test_refusals import (  # noqa: F401
    test_expanded_rows_may_be_read,
    test_logits_that_autograd_tracks_are_not_overwritten,
    test_overwriting_is_seen_by_autograd_s_version_counter,
    test_rows_that_share_memory_are_not_overwritten,
)
from tests.unit.ops.test_row_ops import (  # noqa: F401
    test_rest_softmax_is_the_gradient_up_to_a_factor_per_row,
    test_weighted_gradient_in_one_pass,
    test_wide_rows_beyond_one_program,
)
from tests.unit.ops.test_sequence_sums import (  # noqa: F401
    test_a_masked_nan_does_not_spread,
    test_packings_on_every_backend,
    test_thousands_of_terms_keep_their_digits,
)
from tests.unit.ops.test_token_log_probs import (  # noqa: F401
    test_a_confident_token_keeps_its_digits,
    test_few_rows,
    test_ignored_rows_and_padding_columns_are_bitwise_zero,
    test_inplace_backward_writes_the_same_gradient_over_the_logits,
    test_rows_with_a_stride_give_the_same_bits,
    test_two_runs_agree_bit_for_bit,
    test_uninitialised_outputs_are_written_completely,
    test_values_and_gradients_agree_with_float64,
    test_vocabulary_sizes,
)
