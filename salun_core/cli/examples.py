"""The worked example at the end of each verb's help, with its output as it was printed; a test runs them all."""

from __future__ import annotations

from salun_core.cli.generation_examples import GENERATION_EXAMPLES
from salun_core.cli.ledger_examples import LEDGER_EXAMPLES

EXAMPLES = {
    **LEDGER_EXAMPLES,
    **GENERATION_EXAMPLES,
    "doctor": """
Example:

  $ salun doctor --store s3://salun
  check              state    found
  ───────────────────────────────────────────────────────────
  python             ok       3.11.7
  torch              ok       2.13.0+cpu
  torchvision        ok       0.28.0+cpu
  timm               ok       1.0.31
  safetensors        ok       0.8.0
  scikit-learn       ok       1.9.1
  boto3              ok       1.44.5
  pyarrow            ok       26.0.1
  matplotlib         ok       3.11.2
  device             ok       cpu
  threads            ok       2 cores, OMP_NUM_THREADS=1
  disk               ok       65.3 GiB free
  kfp                ok       2.17.0
  embedded S3        ok       weed
  container engine   ok       docker, podman
  store              ok       s3://salun keeps all 6 promises
  pushgateway        absent   none named
  pushgateway: set PUSHGATEWAY_URL for metrics

  everything that a run needs is here
""",
    "demo": """
Example:

  $ salun demo
                                                                         before   after    retrained
  ──────────────────────────────────────────────────────────────────────────────────────────────────
  UA  forgotten images that the model gets wrong                         0.0%     71.6%    72.1%
  UA_class  of these: the forgotten class                                0.0%     100.0%   100.0%
  UA_samples  of these: the single samples                               0.0%     0.0%     1.9%
  RA  kept training images that it gets right                            100.0%   100.0%   100.0%
  TA  unseen images that it gets right                                   98.1%    96.9%    98.4%
  MIA  forgotten images that an attack calls unseen                      0.0%     73.2%    72.1%
  attack_auc  attack that tells forgotten from unseen (50 % is chance)   55.3%    43.8%    54.8%
  gap  mean distance to the retrained model                              36.1%    0.8%     -
  seconds                                                                5.9      3.0      3.1

  PASSED: all 17 checks hold

  request          names        is                            certificate
  ───────────────────────────────────────────────────────────────────────
  demo-samples-a   12 samples   completed: unlearned          verified
  demo-samples-b   12 samples   completed: unlearned          verified
  demo-class       class 3      completed: unlearned          verified
  demo-person      1 subject    completed: unlearned          verified
  demo-nothing     1 sample     completed: nothing_to_erase   verified

  A rollback was tried and refused:
    rolling demo back to 98cf06e111de would bring back 183 forgotten samples

  The exporter says:
    salun_requests{status="completed"} 5.0
    salun_unlearning_debt_ratio{model_line="demo"} 0.14131274131274132
    salun_runs_since_training{model_line="demo"} 1.0

  model line demo: HEAD is 7cdcd4b03f04, made from 98cf06e111de
    evidence.json     .salun/demo/evidence.json
    decision.json     .salun/demo/decision.json
    report.html       .salun/demo/report.html
    metrics.txt       .salun/demo/metrics.txt

  Next, open the report, or look into the store. In one shell:
    salun demo --serve --work-dir .salun/demo
  and in another:
    set -a; . .salun/demo/s3.env; set +a
    salun model history demo
    salun request list
    salun verify .salun/demo/certificates/demo-samples-a.json --model .salun/demo/versions/7cdcd4b03f04
    salun exporter
""",
    "train classifier": """
Example: without `classifier` it is the same.

  $ salun train classifier --data digits --arch resnet8 --epochs 10 --out base
  model           base
  digest          ef62c1816b09faba1bce16db3423edc6ef9abcbf44887989771d0417ad202caa
  train accuracy  1.0000
  test accuracy   0.9777
""",
    "mask": """
Example: forget.yaml holds {kind: class, class_id: 3}.

  $ salun mask --model base --forget forget.yaml --density 0.5 --out mask.safetensors
  mask     mask.safetensors
  salient  38877
  weights  77754
  density  0.5000
  scores   gradient-magnitude
  digest   bbc0da81baa183065c86b714918d3808c462c218a030549a88f4e4cb160e1b6a
""",
    "unlearn": """
Example:

  $ salun unlearn --model base --mask mask.safetensors --forget forget.yaml --out after
  model           after
  method          salun
  epochs          5
  samples passed  6475
  seconds         3.6800
""",
    "evaluate": """
Example:

  $ salun evaluate --before base --after after --mask mask.safetensors --forget forget.yaml \\
          --out evidence.json --report report.html --retrain-reference
  metric       before    after   retrained   n
  ───────────────────────────────────────────────
  UA           0.0000   1.0000      1.0000   131
  UA_class     0.0000   1.0000      1.0000   131
  RA           1.0000   0.9983      1.0000   1164
  TA           0.9783   0.9689      0.9814   322
  MIA          0.0000   1.0000      1.0000   131
  attack_auc   0.6312   0.0000      0.0000   131
  gap          0.5008   0.0035           -   131

  evidence  evidence.json
  report    report.html
""",
    "gate": """
Example:

  $ salun gate --evidence evidence.json --policy classifier --out decision.json
  rule             threshold                 actual   margin   verdict
  ────────────────────────────────────────────────────────────────────
  forget set       not empty, not all data        -        -   pass
  model changed    > 0 weights                    -        -   pass
  weights finite   0 non-finite                   -        -   pass
  frozen weights   0 changed                      -        -   pass
  a rule applies   4 rules                        -        -   pass
  RA >=            >= 0.9800                 0.9983   0.0183   pass
  TA >=            >= 0.9483                 0.9689   0.0207   pass
  TA >=            >= 0.9283                 0.9689   0.0407   pass
  UA_class >=      >= 0.9500                 1.0000   0.0500   pass

  PASSED by policy classifier; decision in decision.json
""",
    "report": """
Example:

  $ salun report --evidence evidence.json --decision decision.json --out report.html
  report  report.html
  bytes   233126
  judged  yes
""",
    "run": """
Example: run.yaml holds {model_line: digits, forget_manifest_uri: forget.yaml, store_uri: 's3://salun', seed: 1}.

  $ salun run --config run.yaml --work-dir work
  metric       before    after   n
  ───────────────────────────────────
  UA           0.0000   1.0000   131
  UA_class     0.0000   1.0000   131
  RA           1.0000   0.9983   1164
  TA           0.9783   0.9658   322
  MIA          0.0000   1.0000   131
  attack_auc   0.6312   0.0000   131

  PASSED: all 14 checks hold
  published 30ba85d143d2 in place of e0d83e8b3d6f
  report    work/report.html
  all else  work
""",
    "model import": """
Example:

  $ salun model import base/model.safetensors --arch resnet8 --data digits --out imported --line digits
  model           imported
  digest          ef62c1816b09faba1bce16db3423edc6ef9abcbf44887989771d0417ad202caa
  train accuracy  1.0000
  test accuracy   0.9777
  line            digits
  version         e0d83e8b3d6fb2fa5575783399a8aaa6bb84dc26ba8664c6dbb0d893084af46b
""",
    "ls methods": """
Example:

  $ salun ls methods
  model        method               needs_mask   length       learning_rate   about
  ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────
  classifier   salun                yes          5 epochs     0.003           SalUn
  classifier   random_label         no           5 epochs     0.003           Random labelling (RL)
  classifier   retrain              no           182 epochs   0.1             Retrain
  classifier   finetune             no           5 epochs     0.003           Fine-tuning (FT)
  classifier   gradient_ascent      no           5 epochs     0.0005          Gradient ascent (GA)
  classifier   influence            no           1 epochs     0.003           Influence unlearning (IU, WoodFisher)
  classifier   boundary_expanding   no           5 epochs     0.0001          Boundary expanding (BE)
  classifier   boundary_shrink      no           5 epochs     0.0001          Boundary shrink (BS)
  classifier   l1_sparse            no           5 epochs     0.01            l1-sparse
  classifier   salun_soft           no           5 epochs     0.003           SalUn-soft
  classifier   scrub                no           5 epochs     0.003           SCRUB
  classifier   neggrad_plus         no           5 epochs     0.003           NegGrad+
  classifier   sfr_on               no           5 epochs     0.003           SFR-on
  diffusion    salun                yes          150 steps    0.0002          SalUn for diffusion models
  diffusion    random_label         no           150 steps    0.0002          Random labelling (RL) of a diffusion model
  diffusion    finetune             no           150 steps    0.0002          Fine-tuning (FT)
  diffusion    gradient_ascent      no           50 steps     1e-05           Gradient ascent (GA)
  diffusion    retrain              no           960 steps    0.002           Retrain
  diffusion    esd                  no           200 steps    1e-05           Erased Stable Diffusion (ESD)
  diffusion    forget_me_not        no           50 steps     1e-05           Forget-Me-Not (FMN)
  diffusion    uce                  no           150 steps    0.0002          Unified Concept Editing (UCE)
""",
    "ls models": """
Example:

  $ salun ls models
  model              kind
  ───────────────────────────────
  resnet8            architecture
  resnet14           architecture
  resnet20           architecture
  resnet32           architecture
  resnet44           architecture
  resnet56           architecture
  resnet18           architecture
  vgg16_bn           architecture
  swin_t             architecture
  vit_tiny           architecture
  torchvision:NAME   architecture
  timm:NAME          architecture
""",
    "ls data": """
Example:

  $ salun ls data
  data                 what
  ────────────────────────────────────────────────────────────────────────────────────────────────
  digits               1,797 handwritten digits of 8 x 8 pixels; comes with scikit-learn
  fashion-mnist        70,000 pieces of clothing, 28 x 28 pixels; Debian: dataset-fashion-mnist
  torchvision:NAME     a torchvision data set that lies under `root`; none is downloaded
  FOLDER               a folder of class folders, or one with train and test inside
  FILE.parquet         image and label columns, the Hugging Face layout; or a folder of such files
  s3://BUCKET/PREFIX   either of these in a store
  SPEC.yaml            a data spec: source, test_source, columns, size, split, augmentation
""",
}
