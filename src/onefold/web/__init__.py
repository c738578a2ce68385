"""What `onefold serve` serves: a JSON API of one or two runs (`app`), described at /docs (`reference`), and a page.

`served` is a run and its newest network, `generation` what the network is asked for, `turns` the queue before it,
`uploads` an image from outside, `schema` all that is sent and received. The page is `page.html` with its script and
style; it is plain, needs no build step, and fetches nothing from anywhere else.
"""
