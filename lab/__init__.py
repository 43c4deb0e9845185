"""The laboratory: research on SalUn itself, and tools of its developers. The core never imports it.

bench, suites   compare unlearning methods; `salun bench`
calibration     measures how often the gate is right; `salun calibrate`
conformance     checks methods, metrics, attacks and architectures of other packages; `salun plugin check`
studies         scripts that measure single properties; most write into `results`
architectures   full-size networks without weights
seaweedfs       an S3 server on this machine; `salun store serve`
checkout        loads `examples/`, for the demos and for small diffusion models
cli             the verbs above, which `salun` finds by the entry points `salun.verbs`
"""
