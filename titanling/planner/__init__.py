"""Will it fit, and how fast will it be: a layout worked out in one process, without a GPU and without data.

hardware.py   what a device can do
setup.py      a config, a world size and a device, resolved and checked as in training
place.py      the real plans over a model on meta under a fake process group: placements and exact bytes
memory.py     bytes of a rank at the step's peak
traffic.py    collectives of a step
speed.py      FLOPs, and a roofline estimate of a step's time
forecast.py   all of it for one setup; remedy.py: the cheapest changes that make it fit
report.py     as a terminal table and as JSON
"""
