"""The scoring pass: a thin LightningModule around a run."""
