"""The worked examples of the verbs that erase requests, certify, purge, and tell the story of a model line."""

from __future__ import annotations

LEDGER_EXAMPLES = {
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
  Error: rolling digits back to e0d83e8b3d6f would bring back 131 forgotten samples: between lie 1 of its versions, and
  4 completed requests would be undone. To fix it: keep HEAD, or give --reopen to queue these requests again.
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
}
