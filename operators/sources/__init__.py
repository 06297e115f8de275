"""Sources: replayable inputs. See `rayflow.operators.base.Source` for the contract."""
