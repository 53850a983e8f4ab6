"""What clouds ask for bytes that leave them. List prices: what is paid depends on contract, region and volume."""

from __future__ import annotations

from dataclasses import dataclass

from mfs.errors import UsageError

GB = 1 << 30
"""What the three mean by GB on their bills."""


@dataclass(frozen=True)
class Price:
    """Of egress."""

    dollars_per_gb: float
    source: str
    """Where it comes from, and when."""

    def of(self, nbytes: float) -> float:
        """Dollars."""
        return nbytes / GB * self.dollars_per_gb


PRICES = {
    "aws": Price(0.09, "AWS, S3 to the internet, first 10 TB a month, us-east-1; list price of 2026-05"),
    "gcs": Price(0.12, "Google Cloud Storage to the internet, premium tier, first TB a month; list price of 2026-05"),
    "azure": Price(0.087, "Azure to the internet, first 10 TB a month, North America; list price of 2026-05"),
}
"""By name. Sources: aws.amazon.com/s3/pricing, cloud.google.com/storage/pricing, azure.microsoft.com/pricing/details/
bandwidth, as quoted by akave.com (2026-05-07) and cloudtoolstack.com (early 2026). The first 100 GB a month are free at
AWS and Azure. Inside one region no egress is asked: then leave --egress away."""


def parse(text: str) -> Price:
    """'aws', 'gcs', 'azure', or dollars per GB such as '0.05'. Raises: UsageError."""
    if text in PRICES:
        return PRICES[text]
    try:
        price = float(text)
    except ValueError:
        price = -1.0
    if not 0 <= price < 1000:
        raise UsageError(f"--egress {text!r}: expected {', '.join(PRICES)} or dollars per GB such as 0.05")
    return Price(price, "given")
