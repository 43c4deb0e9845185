"""The worked example at the end of each verb's help, with its output as it was printed; a test runs them all."""

from __future__ import annotations

EXAMPLES = {
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
    "train": """
Example:

  $ salun train --data digits --arch resnet8 --epochs 10 --out base
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
    "sweep": """
Example:

  $ salun sweep --once --line digits --min-requests 1 --set epochs=1 --set learning_rate=0.0005 --work-dir sweep
  run        run-20260131-120000-3f9a1c
  claimed    1: 2 waiting, and 1 make a batch
  verdict    PASSED: all 14 checks hold
  settled    r-1: completed
  settled    r-2: completed
  published  digits@30ba85d143d2
  report     sweep/report.html
""",
    "verify": """
Example:

  $ salun verify certificate.json --model model
  VALID: signed by a trusted key, from salun.pub beside the certificate
  whoever made the certificate could have put that key there: compare its id with the signer's own
  all 3 files of model are the certified ones

  request     r-1: received 2026-01-31 09:00, due 2026-02-28 09:00, settled 2026-02-03 11:00
  outcome     unlearned
  model       faces@605a85542c9e, made from d9298a10d1b0
  forgotten   3 training samples, of 4 that the request names
  procedure   salun, configuration 0500b5889ed9
  gate        passed 9 checks of policy classifier
  debt        5.0% forgotten in 2 runs since the last training
  signer      key 44d58a25bbf1c110ab42b0a1dc0d4b74095ca6b0cae4edbe1f879bc251427404

  metric        before    after   retrained      low     high   n
  ──────────────────────────────────────────────────────────────────
  UA            0.0000   0.9750      1.0000   0.8710   0.9960   40
  UA_samples    0.0000   0.1000           -   0.0400   0.2300   40
  RA            1.0000   0.9900           -   0.9800   0.9950   1160
  TA            0.9600   0.9500           -   0.9200   0.9700   300
  MIA           0.0000   0.9750      1.0000   0.8710   0.9960   40
  attack_auc    0.7000   0.5000           -   0.4000   0.6000   40
  MIA_entropy        -        -           -        -        -   0

  disposal             state     when
  ───────────────────────────────────────────────
  resolved ids         deleted   2026-02-03 11:00
  superseded weights   due       2026-03-05 10:00

  This certificate attests that the named procedure was applied to the named model and that the named
  evidence was measured. It does not prove that the model holds nothing of the data: that cannot be
  proved from a model alone (Thudi et al., arXiv 2110.11891).
""",
    "certificate": """
Example:

  $ salun certificate r-1 --out certificate.json
  sha256       4f8e3e4b4d3c1a5a9a51e3a5c0b9f8f1d7d6c5b4a39281706f5e4d3c2b1a0908
  certificate  certificate.json
""",
    "key create": """
Example:

  $ salun key create --out keys/salun
  signing key  keys/salun.pem
  public key   keys/salun.pub
  keyid        4f8e3e4b4d3c1a5a9a51e3a5c0b9f8f1d7d6c5b4a39281706f5e4d3c2b1a0908
""",
    "exporter": """
Example:

  $ salun exporter --once
  # HELP salun_requests Deletion requests by status.
  # TYPE salun_requests gauge
  salun_requests{status="received"} 0.0
  salun_requests{status="rejected"} 0.0
  salun_requests{status="on_hold"} 0.0
  salun_requests{status="queued"} 0.0
  salun_requests{status="in_progress"} 0.0
  salun_requests{status="completed"} 0.0
  salun_requests{status="failed"} 0.0
  salun_requests{status="cancelled"} 0.0
  # HELP salun_oldest_request_age_seconds Age of the oldest request that is not settled.
  # TYPE salun_oldest_request_age_seconds gauge
  salun_oldest_request_age_seconds 0.0
  # HELP salun_requests_overdue Requests past their due date that are not settled.
  # TYPE salun_requests_overdue gauge
  salun_requests_overdue 0.0
  # HELP salun_unlearning_debt_ratio Share of the training data forgotten since the last full training.
  # TYPE salun_unlearning_debt_ratio gauge
  salun_unlearning_debt_ratio{model_line="digits"} 0.10115830115830116
  # HELP salun_runs_since_training Unlearning runs since the last full training.
  # TYPE salun_runs_since_training gauge
  salun_runs_since_training{model_line="digits"} 1.0
  # HELP salun_last_success_timestamp_seconds Unix time of the end of the last run that succeeded.
  # TYPE salun_last_success_timestamp_seconds gauge
  salun_last_success_timestamp_seconds{model_line="digits"} 1.795535134882787e+09
  # HELP salun_requests_by_deadline Requests not settled and past this stage of their month.
  # TYPE salun_requests_by_deadline gauge
  salun_requests_by_deadline{stage="target"} 0.0
  salun_requests_by_deadline{stage="half"} 0.0
  salun_requests_by_deadline{stage="most"} 0.0
  # HELP salun_exporter_last_refresh_timestamp_seconds Unix time of the exporter's last refresh that succeeded.
  # TYPE salun_exporter_last_refresh_timestamp_seconds gauge
  salun_exporter_last_refresh_timestamp_seconds 1.795535135750448e+09
  # HELP salun_exporter_refresh_duration_seconds Wall-clock time of that refresh.
  # TYPE salun_exporter_refresh_duration_seconds gauge
  salun_exporter_refresh_duration_seconds 0.15120256899990636
  # HELP salun_exporter_refresh_failures Refreshes that failed since then.
  # TYPE salun_exporter_refresh_failures gauge
  salun_exporter_refresh_failures 0.0
  # HELP salun_exporter_unreadable_lines Model lines whose HEAD or version is damaged.
  # TYPE salun_exporter_unreadable_lines gauge
  salun_exporter_unreadable_lines 0.0
  # HELP salun_build_info Always 1; the version of the code is a label.
  # TYPE salun_build_info gauge
  salun_build_info{version="0.1.0"} 1.0
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
    "model history": """
Example:

  $ salun model history digits
  version        made by   requests   forgotten   debt      runs   weights   held by   published
  ─────────────────────────────────────────────────────────────────────────────────────────────────────
  30ba85d143d2   salun     -          131         10.1% !   1      sparse    -         2026-11-24 09:29
  e0d83e8b3d6f   import    -          0           0.0%      0      whole     -         2026-11-24 09:29

  Much was forgotten since the last full training: a new one is due.
""",
    "model rollback": """
Example:

  $ salun model rollback digits@e0d83e8b --reason "accuracy fell"
  Error: rolling digits back to e0d83e8b3d6f would bring back 131 forgotten samples: 1 versions lie between, and 4
  completed requests would be undone. To fix it: keep HEAD, or give --reopen to queue these requests again.
""",
    "purge": """
Example:

  $ salun purge --dry-run
  nothing must go
  dry run: nothing was touched
""",
    "model hold": """
Example:

  $ salun model hold digits --reason "audit 2026-02"
  held    digits@30ba85d143d2c1e2a7a3cc1f2a1c5c3f0b0d3f9b6f8e1a2b3c4d5e6f70819203
  by      ana
  since   2026-01-31T09:00:00+00:00
  reason  audit 2026-02
""",
    "model release": """
Example:

  $ salun model release digits
  released     digits@30ba85d143d2c1e2a7a3cc1f2a1c5c3f0b0d3f9b6f8e1a2b3c4d5e6f70819203
  was held by  ana
  since        2026-01-31T09:00:00+00:00
  reason       audit 2026-02
""",
    "ls methods": """
Example:

  $ salun ls methods
  method            needs_mask   epochs   learning_rate   about
  ────────────────────────────────────────────────────────────────────────────
  salun             yes          5               0.0030   SalUn
  random_label      no           5               0.0030   Random labelling (RL)
  retrain           no           182             0.1000   Retrain
  finetune          no           5               0.0030   Fine-tuning (FT)
  gradient_ascent   no           5               0.0005   Gradient ascent (GA)
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
  torchvision:NAME   architecture
  timm:NAME          architecture
""",
    "ls data": """
Example:

  $ salun ls data
  data                 what
  ────────────────────────────────────────────────────────────────────────────────────────────────
  digits               1,797 handwritten digits of 8 x 8 pixels; comes with scikit-learn
  torchvision:NAME     a torchvision data set that lies under `root`; none is downloaded
  FOLDER               a folder of class folders, or one with train and test inside
  FILE.parquet         image and label columns, the Hugging Face layout; or a folder of such files
  s3://BUCKET/PREFIX   either of these in a store
  SPEC.yaml            a data spec: source, test_source, columns, size, split, augmentation
""",
}
