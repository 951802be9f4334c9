"""Tests of `cases/`. A module of this name held the cases once; its names are refused with their new place."""

from megaproof import bare

__getattr__ = bare.old_names("tests.cases")
