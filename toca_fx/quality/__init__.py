"""What forecasts do to the final result, measured, and on which steps to compute because of it."""
