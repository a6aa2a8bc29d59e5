import glob
import importlib.util
import json
import os
import subprocess
import sys
import time

import pytest

from align.accounting.energy import EnergyMeter
from align.accounting.settings import AccountingSettings
from align.errors import InputError

needs_codecarbon = pytest.mark.skipif(
    importlib.util.find_spec("codecarbon") is None, reason="codecarbon is not installed"
)

CONCURRENT_USE = """
import json, time
from codecarbon import OfflineEmissionsTracker
from align.accounting.energy import EnergyMeter
from align.accounting.settings import AccountingSettings

peer = OfflineEmissionsTracker(
    country_iso_code="FRA", output_methods=[], allow_multiple_runs=True, log_level="critical", gpu_ids=[]
)
with EnergyMeter(AccountingSettings(country="FRA")) as meter:
    first = meter.reading
    peer.start()
    before = meter.reading
    end = time.process_time() + 3
    while time.process_time() < end:
        pass
    used = meter.reading - before
    peer.stop()
    around = meter.reading - first
peer_total = peer.final_emissions_data
energy = peer_total.cpu_energy if used.measured else peer_total.cpu_energy + peer_total.ram_energy
peer_kg_per_kwh = peer_total.emissions / peer_total.energy_consumed
print(json.dumps([used.kwh, energy, around.kwh, used.co2_kg / used.kwh, peer_kg_per_kwh]))
"""

QUIET_USE = """
import socket, time
from align.accounting.energy import EnergyMeter
from align.accounting.settings import AccountingSettings

def refuse(*_):
    raise AssertionError("the meter used the network")

socket.socket.connect = socket.getaddrinfo = refuse
with EnergyMeter(AccountingSettings(country="FRA")) as meter:
    time.sleep(1.5)
assert meter.reading.kwh > 0, meter.reading
assert meter.reading.kwh < 1e-2, meter.reading
"""

TIMED_USE = """
import json, time
from align.accounting.settings import AccountingSettings

began = time.process_time()  # CPU seconds of all threads, so that load on the machine does not count
from align.accounting.energy import EnergyMeter
with EnergyMeter(AccountingSettings(country="FRA")) as meter:
    started = time.process_time() - began
    for _ in range(2 * 20):
        meter.reading
    read = time.process_time() - began - started
    busy = time.process_time()
    time.sleep(5)
    idle = (time.process_time() - busy) / 5
print(json.dumps([started, read, idle]))
"""


def run(code, folder, **environment):
    command = [sys.executable, "-W", "error", "-c", code]
    env = {**os.environ, "HOME": str(folder), **environment}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


@needs_codecarbon
def test_the_meter_agrees_with_codecarbon(tmp_path):
    done = run(CONCURRENT_USE, tmp_path)
    assert done.returncode == 0, done.stderr
    kwh, peer_kwh, around_kwh, kg_per_kwh, peer_kg_per_kwh = json.loads(done.stdout)
    # They sample the load at different moments, and codecarbon starts before and stops after the first reading
    assert 0.8 * kwh < peer_kwh < 1.2 * around_kwh
    assert kg_per_kwh == pytest.approx(peer_kg_per_kwh)


@needs_codecarbon
def test_the_meter_ignores_the_environment_and_leaves_no_output(tmp_path):
    wishes = {
        "EMISSIONS_ENDPOINT": "http://127.0.0.1:9",
        "PUE": "1e6",
        "FORCE_CPU_POWER": "1e9",
        "SAVE_TO_FILE": "true",
    }
    done = run(QUIET_USE, tmp_path, **{f"CODECARBON_{name}": value for name, value in wishes.items()})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@needs_codecarbon
def test_differences_of_readings_sum_to_the_total():
    readings = []
    with EnergyMeter(AccountingSettings(grid_g_per_kwh=250)) as meter:
        for _ in range(4):
            readings.append(meter.reading)
            time.sleep(0.2)
    parts = [later - earlier for earlier, later in zip(readings, [*readings[1:], meter.reading], strict=True)]
    assert all(part.kwh > 0 for part in parts)
    assert sum(part.kwh for part in parts) == pytest.approx((meter.reading - readings[0]).kwh)
    assert meter.reading.co2_kg == pytest.approx(meter.reading.kwh / 4)
    counters = [path for path in glob.glob("/sys/class/powercap/intel-rapl*/energy_uj") if os.access(path, os.R_OK)]
    assert meter.reading.measured == bool(counters)
    assert ("estimate" in meter.reading.source) != meter.reading.measured


@needs_codecarbon
def test_the_meter_takes_under_three_percent_of_a_six_minute_run(tmp_path):
    done = run(TIMED_USE, tmp_path)
    assert done.returncode == 0, done.stderr
    started, read, idle = json.loads(done.stdout)
    print(f"CPU: start {started:.2f} s, 40 readings {read:.3f} s, and while it runs {idle:.2%} of a core")
    assert started + read + idle * 360 < 0.03 * 360


@needs_codecarbon
def test_co2_is_unknown_without_a_country_and_a_wrong_one_is_rejected():
    with EnergyMeter(AccountingSettings()) as meter:
        pass
    assert (meter.reading.co2_kg, "no" in meter.reading.source) == (None, True)
    assert "CO2 unknown: neither country nor" in meter.reading.source
    with (
        pytest.raises(InputError, match="codecarbon has no grid for 'XXX'"),
        EnergyMeter(AccountingSettings(country="XXX")),
    ):
        pass


def test_without_codecarbon_energy_is_unknown(monkeypatch):
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    with EnergyMeter(AccountingSettings(country="FRA", grid_g_per_kwh=50)) as meter:
        used = meter.reading - meter.reading
    assert (used.kwh, used.co2_kg, used.measured) == (None, None, False)
    assert used.source == "not measured: codecarbon is not installed: pip install codecarbon"
    assert meter.reading == used


def test_missing_gpus_are_not_measured():
    with EnergyMeter(AccountingSettings(), gpus=["00000000-0000-0000-0000-000000000000"]) as meter:
        pass
    assert meter.reading.kwh is None
    assert meter.reading.source.startswith("not measured: ")
    assert "NVML" in meter.reading.source or "nvidia-ml-py" in meter.reading.source


@pytest.mark.gpu
def test_a_gpus_energy_is_its_power_over_time():
    torch = pytest.importorskip("torch")
    nvml = pytest.importorskip("pynvml")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    uuid = str(torch.cuda.get_device_properties(0).uuid)
    nvml.nvmlInit()
    handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    matrix, watts = torch.ones(4096, 4096, device="cuda"), []
    for _ in range(50):
        matrix @ matrix
    with EnergyMeter(AccountingSettings(), gpus=[uuid]) as meter:
        began = time.perf_counter()
        while time.perf_counter() - began < 5:
            matrix @ matrix
            torch.cuda.synchronize()
            watts.append(nvml.nvmlDeviceGetPowerUsage(handle) / 1000)
        seconds = time.perf_counter() - began
    assert meter.reading.measured
    assert meter.reading.kwh * 3.6e6 == pytest.approx(sum(watts) / len(watts) * seconds, rel=0.25)
