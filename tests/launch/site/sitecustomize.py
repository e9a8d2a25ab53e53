"""Has processes that a test starts know the rehearsal."""

from tests.launch import rehearsal

rehearsal.register()
