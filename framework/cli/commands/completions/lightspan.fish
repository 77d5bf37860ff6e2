# Completion of `lightspan` in fish 3.4 or newer: lightspan completion fish | source
function __lightspan_candidates
    set -l words (commandline -opc)
    set -l begun (commandline -ct)
    set -l answer ($words[1] completion fish --words $words[2..] "$begun" 2>/dev/null)
    switch "$answer[1]"
        case files
            __fish_complete_path "$begun"
        case folders
            __fish_complete_directories "$begun" ''
    end
    for candidate in $answer[2..]
        echo $candidate
    end
end
complete --command lightspan --no-files --arguments '(__lightspan_candidates)'
