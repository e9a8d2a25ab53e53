"""Cron expressions.

Facts pinned:
- five fields are completed by the seconds, six stay as they are;
- what the server would refuse, or what never comes to pass, is refused, by field.
"""

import pytest

from pipelines import cron


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("0 3 * * *", "0 0 3 * * *"),
        ("30 0 3 * * *", "30 0 3 * * *"),
        ("  */15  8-18 * * mon-fri ", "0 */15 8-18 * * mon-fri"),
        ("0 0 12 ? JAN,Jul 1-5/2", "0 0 12 ? JAN,Jul 1-5/2"),
        ("5/10 * * * *", "0 5/10 * * * *"),
        ("0 0 29 2 *", "0 0 0 29 2 *"),
        ("0 0 28,31 2 *", "0 0 0 28,31 2 *"),
        ("0 0 31 2/5 *", "0 0 0 31 2/5 *"),  # July too
        ("0 0 31 2 mon", "0 0 0 31 2 mon"),  # Mondays of February
    ],
)
def test_cron_is_completed(given, expected):
    assert cron.six_fields(given) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "expected 5 fields"),
        ("0 3 * *", "expected 5 fields"),
        ("0 0 3 * * * 2026", "expected 5 fields"),
        ("@daily", "expected 5 fields"),
        ("60 3 * * *", "cron: minute of '60 3 [*] [*] [*]': expected 0 to 59"),
        ("0 24 * * *", "hour of .* 0 to 23"),
        ("60 0 3 * * *", "second of .* 0 to 59"),
        ("0 0 0 * *", "day of month of .* 1 to 31"),
        ("0 0 * 13 *", "month of .* 1 to 12"),
        ("0 0 * * 7", "day of week of .* 0 to 6"),
        ("0 0 * * fri-mon", "day of week of .* rising"),
        ("*/0 * * * *", "minute of .* a step of 1 or more"),
        ("5/ * * * *", "minute of .* a step of 1 or more"),
        ("1,,2 * * * *", "minute of .* numbers"),
        ("1-2-3 * * * *", "minute of .* numbers"),
        ("mon * * * *", "minute of .* numbers"),
        ("0 0 L * *", "day of month of .* numbers"),
        ("0 0 30 2 *", "a day that its months have"),
        ("0 0 31 4,6 ?", "a day that its months have"),
        ("0 0 31 2/9 *", "a day that its months have"),  # February and November
    ],
)
def test_bad_cron_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        cron.six_fields(given)
