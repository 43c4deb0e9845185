"""The worked examples of diffusion models and of the bench; see `examples`."""

from __future__ import annotations

from salun_core.cli.bench import RENDER_EXAMPLE, RUN_EXAMPLE

GENERATION_EXAMPLES = {
    "bench run": RUN_EXAMPLE,
    "bench render": RENDER_EXAMPLE,
    "train ddpm": """
Example: far too few steps to draw anything; without the settings it is the recipe that does.

  $ salun train ddpm --data digits --set steps=8 --set channels=[16,16] --out ddpm
  model       ddpm
  digest      0ed245a341c797f00c2985e3736d1231e38e0fd47118264141df29141161f8ac
  parameters  72817
  loss        0.4084
""",
    "train stable-diffusion": """
Example: sd.yaml holds {source: digits, size: 16, channels: 3}; far too few steps to draw anything.

  $ salun train stable-diffusion --data sd.yaml --set steps=8 --set channels=[16,16] \\
      --set autoencoder_steps=8 --set autoencoder_channels=[8,8] --out sd
  model       sd
  digest      7202b056402cac20eac427aa4a6fa32ef18991db88d5192324768c317549b114
  parameters  121028
  loss        0.9352
""",
    "model import-diffusers": """
Example:

  $ salun model import-diffusers sd --data sd.yaml --judge judge --out imported
  model       imported
  digest      7202b056402cac20eac427aa4a6fa32ef18991db88d5192324768c317549b114
  parameters  121028
""",
    "demo-diffusion": """
Example:

  $ salun demo-diffusion --kind ddpm
""",
}
