"""End a turn: record how it went."""

from kfp import dsl

from components.images import CPU_IMAGE


@dsl.component(base_image=CPU_IMAGE, install_kfp_package=False)
def end_turn(status: dsl.PipelineTaskFinalStatus):
    """Record how the turn ended, failures above all, in its record and its tracking run.

    Args:
        status: How the steps ended; the engine fills it in for an exit handler.
    """
    from flowloom.lifecycle import turns

    turns.close(status.state, status.error_message)
