"""Attribution in plain torch: AttnLRP rules, and accumulators of |W * gradient|. No Lightning here."""
