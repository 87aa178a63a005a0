"""What each study may be told: options, with a help text for each. Ground floor, and without torch."""

from causal_probe.options.base import Help, Option, Options, Subject, UnknownOptionError, check_value, takes
from causal_probe.options.discover import DiscoverOptions
from causal_probe.options.recover import GradientOptions, InContextOptions, RecoverOptions, TokensOptions
from causal_probe.options.registry import STUDIES, Study
from causal_probe.options.scan import MergeOptions, ScanOptions
from causal_probe.options.studies import (
    CheckOptions,
    EvidenceOptions,
    LeaderboardOptions,
    MeasureOptions,
    ReproduceOptions,
    SentimentOptions,
    SessionsOptions,
    SweepOptions,
)

__all__ = [
    "STUDIES",
    "CheckOptions",
    "DiscoverOptions",
    "EvidenceOptions",
    "GradientOptions",
    "Help",
    "InContextOptions",
    "LeaderboardOptions",
    "MeasureOptions",
    "MergeOptions",
    "Option",
    "Options",
    "RecoverOptions",
    "ReproduceOptions",
    "ScanOptions",
    "SentimentOptions",
    "SessionsOptions",
    "Study",
    "Subject",
    "SweepOptions",
    "TokensOptions",
    "UnknownOptionError",
    "check_value",
    "takes",
]
