#!/usr/bin/env bash
# Submits this repository to AIcrowd: commits, checks, pushes, and then tags.
#
#     ./submit.sh NAME [OPTION of my_submission.check]…
#
# The tag is submission-NAME. It exists only after the check has passed and the remote has accepted it, so the
# command can be repeated after an error. REMOTE names another remote than "aicrowd", PYTHON another interpreter
# than "python".
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

stop() {
    echo "submit.sh: $*" >&2
    exit 1
}

[[ $# -ge 1 && $1 != -* ]] || stop "expected a name, such as ./submit.sh first"
tag="submission-$1"
shift
remote=${REMOTE:-aicrowd}
python=${PYTHON:-python}

git check-ref-format "refs/tags/$tag" || stop "'$tag' cannot be the name of a tag: use letters, digits and -"
branch=$(git symbolic-ref --quiet --short HEAD) || stop "no branch is checked out: git switch --create submission"
git remote get-url "$remote" >/dev/null 2>&1 ||
    stop "no remote '$remote': git remote add $remote git@gitlab.aicrowd.com:USER/REPOSITORY.git"
git lfs version >/dev/null 2>&1 || stop "Git LFS is missing: sudo apt-get install git-lfs"
"$python" -c "" 2>/dev/null || stop "no command '$python': activate the environment, or set PYTHON"
git var GIT_COMMITTER_IDENT >/dev/null || stop "git does not know who you are: see above"
! git rev-parse --quiet --verify "refs/tags/$tag" >/dev/null || stop "the tag $tag exists: choose another name"
taken=$(git ls-remote --tags "$remote" "refs/tags/$tag") || stop "the remote '$remote' cannot be reached"
[[ -z $taken ]] || stop "the remote has the tag $tag: choose another name"

git lfs install --local >/dev/null
files=$(mktemp)
trap 'rm -f "$files"' EXIT
"$python" -m my_submission.check --files >"$files" || { cat "$files" >&2; exit 1; }
git add --all
git --literal-pathspecs add --force --pathspec-from-file="$files" --pathspec-file-nul
git diff --cached --quiet || git commit --message="Submission: ${tag#submission-}"

tagged=$(git ls-remote --tags "$remote" 'refs/tags/submission-*')
[[ $tagged != *"$(git rev-parse HEAD)"* ]] ||
    stop "the remote has a submission tag of this commit: git commit --allow-empty --message='Submit again'"
"$python" -m my_submission.check --before-tag "$@"

# The files first: a tag that the server sees must have all of them.
git push "$remote" "HEAD:refs/heads/$branch"
object=$(
    printf 'object %s\ntype commit\ntag %s\ntagger %s\n\n%s\n' \
        "$(git rev-parse HEAD)" "$tag" "$(git var GIT_COMMITTER_IDENT)" "$tag" | git mktag
)
git push "$remote" "$object:refs/tags/$tag"
git update-ref "refs/tags/$tag" "$object" ""
echo "submitted: $tag; its evaluation appears among the issues of the repository at $remote"
