"""Networks: what every network is (`base`), and those that there are."""
