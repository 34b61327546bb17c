"""Joules of devices, and what they mean: kWh, CO2 of the electricity, of what stands idle, and of making the hardware.

The formulas are those of Luccioni et al. 2022 (arXiv 2211.02001), whose figures for BLOOM-176B are the defaults and
come out of them: 1,082,990 A100 hours, 433,196 kWh, 24.7 t; 39.3 t with idle infrastructure; 50.5 t with embodied CO2.
"""

import dataclasses
from typing import NamedTuple

from bloomjax.chips import GPUS, TPUS, Chip
from bloomjax.errors import BadInput

JOULES_PER_KWH = 3.6e6

# Of the paper's totals: 689,842 kWh with the infrastructure that is switched on and idle, 433,196 kWh without.
IDLE_RATIO = (689_842 - 433_196) / 433_196
SERVER_KG, DEVICE_KG = 2500.0, 150.0  # CO2 of making one: a server without its GPUs, a GPU
LIFETIME_HOURS = 6 * 8760 * 0.85  # of six years, the share in which it is used
DEVICES_PER_SERVER = 8

# ---- power ----

# Of its TDP what a device draws that holds a program and computes nothing. Two H100 of 700 W, memory full, use 0 % and
# 4 %: 145 W and 140 W (nvidia-smi in github.com/wilicc/gpu-burn/issues/114).
IDLE_FRACTION = 0.2
# Measured: arXiv 2304.01433, table 4 ("idle").
_IDLE_WATTS = {"TPU v4": 90.0}
# What `chips` does not have, by a part of jax's device_kind: TDP, or the highest it can be set to, of NVIDIA's data
# sheets. None: not published, or (GH200) not without its CPU. The longest name that is a part counts.
_MORE_WATTS: dict[str, float | None] = {
    "V100-PCIE": 250.0, "V100-SXM2": 300.0, "Tesla T4": 70.0, "A100-PCIE-40GB": 250.0, "A100 80GB PCIe": 300.0,
    "H100 PCIe": 350.0, "H100 NVL": 400.0, "H200 NVL": 600.0, "GH200": None, "NVIDIA L4": 72.0,
    "NVIDIA L40": 300.0, "NVIDIA L40S": 350.0, "TPU v4 lite": None,
}  # fmt: skip


class Power(NamedTuple):
    """What one device draws while it trains, and while it waits; source says whose figures these are."""

    watts: float
    idle_watts: float
    source: str


def given_power(watts: float, idle_watts: float | None = None) -> Power:
    """What a person says of one device. BadInput for what is no power."""
    idle = IDLE_FRACTION * watts if idle_watts is None else idle_watts
    if not 0 <= idle <= watts < 1e5 or watts == 0:
        raise BadInput(
            f"a device that draws {watts:g} W, and {idle:g} W when it waits? device_watts must be above 0 and below "
            "1e5, idle_device_watts from 0 to device_watts"
        )
    return Power(watts, idle, f"given: {watts:g} W training, {idle:g} W waiting")


def power_of(device_kind: str) -> Power | None:
    """By `jax.Device.device_kind`; None where nobody has published it (CPUs, newer TPUs, slices of a GPU)."""
    kind = device_kind.casefold()
    known = {chip.device_kind: chip.watts for chip in (TPUS | GPUS).values()} | _MORE_WATTS
    names = [name for name in known if name.casefold() in kind]
    if not names or " mig " in kind:
        return None
    name = max(names, key=len)
    watts = known[name]
    if watts is None:
        return None
    idle = _IDLE_WATTS.get(name, IDLE_FRACTION * watts)
    return Power(watts, idle, f"table: {watts:g} W training, {idle:g} W waiting")


def chip_named(name: str) -> Chip:
    """As in a target of `plan`. BadInput, with the names there are."""
    chips = GPUS | TPUS
    if name not in chips:
        raise BadInput(f"no device {name!r}; there are {', '.join(chips)} (or give --device_watts)")
    return chips[name]


def joules(power: Power, device_seconds: float, step_share: float) -> float:
    """Of devices that train for `step_share` (0 to 1) of the time and wait for the rest."""
    return device_seconds * (power.watts * step_share + power.idle_watts * (1 - step_share))


# ---- CO2 ----

# Grams of CO2 a kWh of the grid. france: arXiv 2211.02001. The others are of 2024, emissions of generation alone:
# github.com/GoogleCloudPlatform/region-carbon-info, data/yearly/2024.csv, which has 40 regions.
REGIONS = {
    "france": 57.0, "asia-east1": 439.29, "asia-northeast1": 452.85, "asia-south1": 678.76,
    "asia-southeast1": 366.85, "europe-north1": 39.32, "europe-west1": 103.37, "europe-west2": 105.94,
    "europe-west3": 275.82, "europe-west4": 208.81, "europe-west6": 15.05, "europe-west9": 16.30,
    "northamerica-northeast1": 5.48, "us-central1": 412.72, "us-east1": 575.77, "us-east4": 323.05,
    "us-south1": 302.95, "us-west1": 79.23, "us-west4": 357.30,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Site:
    """Where the electricity comes from, and what runs beside the devices.

    Attributes:
      grams_co2_per_kwh: of the grid.
      pue: power usage effectiveness, on the devices' energy. 1.0 as in the paper's totals (Jean Zay has 1.2), which
        count the infrastructure by `idle_ratio`.
      idle_ratio: kWh of what is switched on and idle, a kWh of the devices; that of Jean Zay.
    """

    grams_co2_per_kwh: float = REGIONS["france"]
    pue: float = 1.0
    idle_ratio: float = IDLE_RATIO

    def __post_init__(self):
        if not 0 <= self.grams_co2_per_kwh < 5000:
            raise BadInput(
                f"co2_grams_per_kwh must be from 0 to 5000, got {self.grams_co2_per_kwh:g}"
            )
        if not 1 <= self.pue < 10:
            raise BadInput(
                f"pue is all power of a site over that of its computers: from 1 to 10, got {self.pue:g}"
            )
        if not 0 <= self.idle_ratio < 100:
            raise BadInput(f"idle_ratio must be from 0 to 100, got {self.idle_ratio:g}")


def grams_of(region: str) -> float:
    """Of CO2 a kWh. BadInput, with the regions there are."""
    if region not in REGIONS:
        raise BadInput(
            f"no region {region!r}; there are {', '.join(REGIONS)}; or give co2_grams_per_kwh"
        )
    return REGIONS[region]


def servers_per_device(device_kind: str) -> float:
    """Of the usual machine: an eighth of one for a GPU, a quarter for a TPU chip; a CPU is its own."""
    kind = device_kind.casefold()
    if "cpu" in kind:
        return 1.0
    return 1 / 4 if "tpu" in kind else 1 / DEVICES_PER_SERVER


class Embodied(NamedTuple):
    """Tonnes of CO2 of making the hardware, for the hours it was used."""

    servers_tonnes: float
    devices_tonnes: float


def embodied(device_hours: float, server_hours: float) -> Embodied:
    """2500 kg a server and 150 kg a GPU (taken for any accelerator), over 6 years used for 85 % of the time."""
    return Embodied(
        server_hours * SERVER_KG / LIFETIME_HOURS / 1e3,
        device_hours * DEVICE_KG / LIFETIME_HOURS / 1e3,
    )


def dynamic_tonnes(kwh: float, site: Site) -> float:
    """CO2 of the devices' energy: kWh x PUE x grams a kWh."""
    return kwh * site.pue * site.grams_co2_per_kwh / 1e6


def idle_tonnes(kwh: float, site: Site) -> float:
    """CO2 of infrastructure that is switched on and idle beside devices that use `kwh`."""
    return kwh * site.idle_ratio * site.grams_co2_per_kwh / 1e6
