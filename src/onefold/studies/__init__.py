"""Studies: the same training under several settings and seeds, compared in a table and in pictures."""

from onefold.studies.bias import run_bias
from onefold.studies.collapse import collapse
from onefold.studies.initialisation import initialisation
from onefold.studies.onestep import onestep
from onefold.studies.runner import run_study
from onefold.studies.study import Arm, Study, Trial

__all__ = ["Arm", "Study", "Trial", "collapse", "initialisation", "onestep", "run_bias", "run_study"]
