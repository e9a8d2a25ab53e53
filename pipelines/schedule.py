"""A pipeline's schedule on a Kubeflow Pipelines server: declared, replaced, switched, deleted.

A declaration is compared by its digest. One that differs is replaced: the new schedule is created
disabled, the old one deleted, then the new one enabled. So at no moment are two enabled, and the
same command goes on where it was interrupted.
"""

from collections.abc import Mapping
from typing import Any

from pipelines.cluster import (
    SCHEDULE_MARK,
    Job,
    Say,
    digest,
    experiment_id,
    ident_of,
    mark_of,
    version_ids,
)
from pipelines.server import Server, ServerError, predicate


def declare(
    server: Server, job: Job, arguments: Mapping[str, Any], cron: str, say: Say, enabled: bool
) -> Any:
    """Make the server's schedule of this job the one given.

    Args:
        server: Where.
        job: What; its label is the schedule's name.
        arguments: The pipeline's, in every run.
        cron: Six fields.
        say: Prints a line.
        enabled: Whether it starts runs from now on.
    """
    experiment = experiment_id(server, job.experiment)
    pipeline, version = version_ids(server, job)
    given = {"arguments": dict(arguments), "version": version, "as": job.service_account}
    wanted = digest({"cron": cron, **given})
    there = ours(server, experiment, job.label, say)
    same = [schedule for schedule in there if mark_of(SCHEDULE_MARK, schedule) == wanted]
    old = [schedule for schedule in there if schedule not in same] + same[1:]
    if same:
        kept = same[0]
    else:
        models = server.client.api_models
        body = models.V2beta1RecurringRun(
            experiment_id=experiment,
            display_name=job.label,
            description=f"flowloom schedule {wanted}: recipe {job.key['recipe']}, {cron}",
            pipeline_version_reference=models.V2beta1PipelineVersionReference(
                pipeline_id=pipeline, pipeline_version_id=version
            ),
            runtime_config=models.V2beta1RuntimeConfig(parameters=dict(arguments)),
            service_account=job.service_account,
            trigger=models.V2beta1Trigger(cron_schedule=models.V2beta1CronSchedule(cron=cron)),
            mode="ENABLE" if enabled and not old else "DISABLE",
            max_concurrency="1",
            no_catchup=True,
        )

        def find() -> Any:
            found = ours(server, experiment, job.label)
            return next((one for one in found if mark_of(SCHEDULE_MARK, one) == wanted), None)

        call = server.client.recurring_runs.recurring_run_service_create_recurring_run
        kept = server.create(f"creating schedule {job.label}", find, call, recurring_run=body)
    ident_of(server, kept.recurring_run_id)
    for schedule in old:
        _delete(server, schedule)
    switched = _switch(server, kept, enabled)
    state, times = "enabled" if enabled else "disabled", f"{cron} {job.time_zone}"
    if same and not old:
        say(f"schedule {job.label}: {'now ' if switched else 'there already, '}{state}, {times}")
    else:
        say(f"schedule {job.label}: {'replaced' if old else 'created'}, {state}, {times}")
    return kept


def switch(server: Server, experiment: str, label: str, enabled: bool, say: Say) -> None:
    """Enable or disable the schedule of that name.

    Raises:
        ServerError: If there is none.
    """
    there = ours(server, experiment_id(server, experiment, create=False), label, say)
    if not there:
        raise ServerError(f"schedule {label}: there is none; --cron declares it")
    state = "enabled" if enabled else "disabled"
    if enabled and len(there) > 1:
        raise ServerError(
            f"schedule {label}: {len(there)} are there, as a replacement was interrupted; expected "
            "the declaration again (--cron), which ends it"
        )
    changed = [_switch(server, schedule, enabled) for schedule in there]
    say(f"schedule {label}: {'now ' if any(changed) else 'already '}{state}")


def delete(server: Server, experiment: str, label: str, say: Say) -> None:
    """Delete the schedule of that name, if there is one."""
    there = ours(server, experiment_id(server, experiment, create=False), label, say)
    for schedule in there:
        _delete(server, schedule)
    say(f"schedule {label}: {'deleted' if there else 'there is none'}")


def ours(server: Server, experiment: Any, label: str = "", say: Any = None) -> list[Any]:
    """Schedules of this command, of that name or of any, the oldest first.

    Args:
        server: Where.
        experiment: Id; None for one that does not exist.
        label: Name; empty for any.
        say: Prints a line about a schedule of that name that is not of this command.
    """
    if experiment is None:
        return []
    given = {"filter": predicate("display_name", label)} if label else {}
    call = server.client.recurring_runs.recurring_run_service_list_recurring_runs
    what, field = "listing schedules", "recurring_runs"
    found = server.listed(what, call, field, experiment_id=experiment, **given)
    if say:
        for schedule in found:
            if not mark_of(SCHEDULE_MARK, schedule):
                say(f"schedule {label}: {schedule.recurring_run_id} is not ours and stays")
    found = [schedule for schedule in found if mark_of(SCHEDULE_MARK, schedule)]
    return sorted(found, key=lambda schedule: (str(schedule.created_at), schedule.recurring_run_id))


def lines(server: Server, experiment: str, label: str = "") -> list[str]:
    """A line for each schedule of this command."""
    found = ours(server, experiment_id(server, experiment, create=False), label)
    shown = []
    for schedule in found:
        cron = schedule.trigger.cron_schedule.cron if schedule.trigger else ""
        state = "enabled" if _enabled(schedule) else "disabled"
        link = server.link("recurringrun", schedule.recurring_run_id)
        shown.append(f"{schedule.display_name:<32} {state:<8}  {cron:<16}  {link}")
    return shown


def _enabled(schedule: Any) -> bool:
    # Servers give either or both.
    return schedule.mode == "ENABLE" or (not schedule.mode and schedule.status == "ENABLED")


def _switch(server: Server, schedule: Any, enabled: bool) -> bool:
    """Set whether the schedule starts runs; returns whether that is a change."""
    if _enabled(schedule) == enabled:
        return False
    api, ident = server.client.recurring_runs, schedule.recurring_run_id
    if enabled:
        what, call = "enabling schedule", api.recurring_run_service_enable_recurring_run
    else:
        what, call = "disabling schedule", api.recurring_run_service_disable_recurring_run
    server.ask(f"{what} {schedule.display_name}", call, ident)
    return True


def _delete(server: Server, schedule: Any) -> None:
    call = server.client.recurring_runs.recurring_run_service_delete_recurring_run
    try:
        server.ask(f"deleting schedule {schedule.display_name}", call, schedule.recurring_run_id)
    except ServerError as error:
        if error.status != 404:  # deleted by a call whose answer was lost
            raise
