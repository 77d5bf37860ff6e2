#compdef lightspan
# Completion of `lightspan` in zsh, after compinit: source <(lightspan completion zsh)
_lightspan() {
    local line entry
    local -a answer whole open
    answer=("${(@f)$("$words[1]" completion zsh --words "${(@)words[2,CURRENT-1]}" "$PREFIX" 2>/dev/null)}")
    for line in "${(@)answer[2,-1]}"; do
        entry="${${line%%$'\t'*}//:/\\:}"
        [[ $line == *$'\t'* ]] && entry+=":${line#*$'\t'}"
        if [[ ${line%%$'\t'*} == *[.=] ]]; then open+=("$entry"); else whole+=("$entry"); fi
    done
    (( $#whole )) && _describe word whole
    (( $#open )) && _describe setting open -S ''
    case $answer[1] in
        files) _files ;;
        folders) _files -/ ;;
    esac
}
if [[ $funcstack[1] == _lightspan ]]; then _lightspan "$@"; else compdef _lightspan lightspan; fi
