"""Pipeline components: one door per stage. Unpack, call the library once, hand on."""
