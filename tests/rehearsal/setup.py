"""What a rehearsal's process does before anything is built."""


def transformer_engine_adam() -> None:
    """Import Megatron-Core as it is here, then let its optimizer take the stand-in for TransformerEngine's
    FusedAdam."""
    import rlsc_mcore.training.step
    from tests.helpers.transformer_engine import install

    assert rlsc_mcore.training.step
    install()
