"""The web app of ``kmdx serve``: songs are uploaded, wait in a queue, and are separated in turn.

:mod:`jobs` keeps the queue on disk, :mod:`worker` separates, :mod:`guard` decides which requests are
answered, :mod:`app` has the HTTP interface, and ``page/`` the page. None of them imports torch before a song
is separated or checked.
"""
