"""Images -> written questions -> extracted -> answered -> filtered: the data that the QA reward needs."""
