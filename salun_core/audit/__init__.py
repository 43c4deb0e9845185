"""An independent measurement from outside: models or their predictions before and after, and no pipeline or store.

predictions  files of predictions -> outputs of all models on the same samples
folders      model folders or weights with images -> the same outputs, and the networks
checks       outputs -> tests, each with its interval, threshold and verdict
statement    tests -> `audit.json`, signed by the auditor and verified by anybody; the report
"""
